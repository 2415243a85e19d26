"""How long before the end of a step the one behind it is planned: late, so that what comes meanwhile is in it.

A step that is planned when the one before it begins has what comes during that one wait for the whole of it as well:
prompts, and sequences whose KV comes from another instance, of which the next token is due. All that the host needs is
time to plan.
"""

# To plan and launch; steps shorter than this are planned at once. And Python hands its lock on within 5 ms.
_LEAST_S = 5e-3
# Steps of one load differ by a few hundredths, and predictions are off by as much.
_LEAST_SHARE = 0.1
# Where the host came too late the share doubles; it shrinks again with each step where it did not.
_GROWTH, _DECAY = 2.0, 0.99


def planning_lead_s(step_s: float, share: float = _LEAST_SHARE) -> float:
    """Before the predicted end of a step of so many seconds; all of it where that is short."""
    return min(step_s, _LEAST_S + share * step_s)


class PlanningLead:
    """Learns how much of a step the host needs here."""

    def __init__(self) -> None:
        self._share = _LEAST_SHARE

    def seconds(self, step_s: float) -> float:
        """See planning_lead_s."""
        return planning_lead_s(step_s, self._share)

    def learn(self, *, was_late: bool) -> None:
        """was_late: the device was done with a step before the one behind it was launched."""
        self._share = min(1.0, max(_LEAST_SHARE, self._share * (_GROWTH if was_late else _DECAY)))
