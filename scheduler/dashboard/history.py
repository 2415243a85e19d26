"""The last samples, each encoded once: any number of viewers costs a join of bytes."""

from collections import deque
from collections.abc import Iterable


class History:
    """Samples are numbered from 0. The oldest give way."""

    def __init__(self, max_samples: int) -> None:
        if max_samples < 1:
            raise ValueError(f"max_samples={max_samples} must be at least 1")
        self._samples: deque[bytes] = deque(maxlen=max_samples)
        self.next_number = 0

    def append(self, sample: bytes) -> None:
        """sample is JSON."""
        self._samples.append(sample)
        self.next_number += 1

    def since(self, number: int) -> Iterable[bytes]:
        """Those from that number on, as far as they are still there."""
        num_wanted = max(0, min(self.next_number - number, len(self._samples)))
        return list(self._samples)[len(self._samples) - num_wanted :]
