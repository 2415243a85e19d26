"""What decodes on a simulated instance: sequences that each grow by one token per step."""

import heapq

from xllm_compile.benchmarks.simulation.requests import SimRequest


class DecodeBatch:
    """Any number of steps at once costs the same: sequences are kept by the step that they end with."""

    def __init__(self) -> None:
        self._step = 0
        self._members: dict[int, tuple[SimRequest, int]] = {}
        self._ends: list[tuple[int, int]] = []
        self.num_context_tokens = 0
        """KV tokens of the members."""

    def __len__(self) -> int:
        return len(self._members)

    def add(self, request: SimRequest) -> None:
        end = self._step + request.num_output_tokens - request.num_generated
        self._members[request.number] = (request, end)
        heapq.heappush(self._ends, (end, request.number))
        self.num_context_tokens += request.num_tokens

    def remove(self, request: SimRequest) -> None:
        _, end = self._members.pop(request.number)
        request.num_generated = request.num_output_tokens - (end - self._step)
        self.num_context_tokens -= request.num_tokens

    def last(self) -> SimRequest:
        """Who joined last."""
        return self._members[next(reversed(self._members))][0]

    def members(self) -> list[SimRequest]:
        """With the tokens they have by now."""
        for request, end in self._members.values():
            request.num_generated = request.num_output_tokens - (end - self._step)
        return [request for request, _ in self._members.values()]

    def steps_to_end(self) -> int:
        """Until the first of them ends."""
        while self._ends and not self._is_current(*self._ends[0]):
            heapq.heappop(self._ends)
        return self._ends[0][0] - self._step

    def advance(self, num_steps: int) -> list[SimRequest]:
        """Everyone grows by so many tokens, at most until the first end. Returns those that end, taken out."""
        self._step += num_steps
        self.num_context_tokens += num_steps * len(self._members)
        ended = []
        while self._ends and self._ends[0][0] <= self._step:
            end, number = heapq.heappop(self._ends)
            if self._is_current(end, number):
                request = self._members[number][0]
                self.remove(request)
                ended.append(request)
        return ended

    def _is_current(self, end: int, number: int) -> bool:
        """Not of a member that left, or came back since."""
        found = self._members.get(number)
        return found is not None and found[1] == end
