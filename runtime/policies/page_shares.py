"""Who gets physical pages where several models of one process share them: pure functions over what each model uses.

Free pages are for whoever asks. Where there are none left, models give up what no live sequence of theirs holds: idle
ones down to what one full sequence needs, busy ones what they have above an equal share.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PageUse:
    """One model's KV pages."""

    num_owned: int = 0
    num_held: int = 0
    """Of these, pages of live sequences, as scheduling counts them."""
    num_cached: int = 0
    """Of the others, pages whose content can be found."""
    num_wanted: int = 0
    """Pages that it would use soon on top of those held."""
    min_pages: int = 0
    """What one sequence of full length needs; no other model gets these."""

    @property
    def num_lacking(self) -> int:
        return max(0, self.num_held + self.num_wanted - self.num_owned)


def num_granted(use: PageUse, *, num_free: int, fair_share: int, is_contested: bool) -> int:
    """Free pages that the model may take: rather than evict what it has cached, but not what others lack."""
    wish = use.num_held + use.num_cached + use.num_wanted - use.num_owned
    if is_contested:
        wish = min(wish, use.num_lacking, max(fair_share, use.min_pages) - use.num_owned)
    return max(0, min(wish, num_free))


def num_surplus(use: PageUse, *, fair_share: int) -> int:
    """Pages that the model gives up to another that lacks some."""
    keep = max(use.min_pages, use.num_held, min(use.num_held + use.num_wanted, fair_share))
    return max(0, use.num_owned - keep)
