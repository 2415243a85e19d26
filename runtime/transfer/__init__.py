"""Moves KV between the instances of a service."""
