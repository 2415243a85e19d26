"""What a gateway counts of its requests' ways through the instances. Counters only grow."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ClusterStats:
    num_placed: int = 0
    """Requests, and again each time that one is placed anew."""
    num_split: int = 0
    """Of these, prefilled on one instance and decoded on another."""
    num_handed_over: int = 0
    """Of those the ones that got so far with all of their KV. How many did not is counted where they were prefilled."""
    num_lost: int = 0
    """Placements that ended because the instance was lost, or ended the request."""
    num_refused: int = 0
    """Placements that the instance refused."""
    num_fetches: int = 0
    """Prefixes that instances were asked to send to others;"""
    num_failed_fetches: int = 0
    """those of which less arrived than was asked for."""
    num_fetched_tokens: int = 0
    """Tokens of KV that arrived instead of being computed."""
    num_migrated: int = 0
    """Offline requests that another instance took over while they decoded."""
    num_migrations_refused: int = 0
    """Those that it had no room for after all."""
    num_resumed_tokens: int = 0
    """Tokens with which requests went on elsewhere."""
