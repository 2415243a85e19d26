"""What sizes of steps a trace of requests causes: continuous batching, replayed on predicted step times.

Arrival times and step times decide how many sequences decode together, which no list of lengths tells.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence

StepTime = Callable[[int, int], float]
"""(tokens of the step, keys its decodes read) -> seconds."""


def replay_steps(
    requests: Sequence[tuple[float, int, int]], step_time: StepTime, *, max_tokens: int, max_seqs: int
) -> dict[int, float]:
    """How many steps of each size serve the requests, given as (arrival in s, prompt, output tokens), by arrival.

    As the local scheduler: every running sequence decodes in each step, prompts fill what is left of ``max_tokens`` in
    order of arrival, chunk by chunk; at most ``max_seqs`` run. A prompt's last chunk gives the first output token.
    Raises ValueError unless max_seqs <= max_tokens, arrivals ascend and lengths are positive.
    """
    if not 1 <= max_seqs <= max_tokens:
        raise ValueError(f"max_seqs={max_seqs} must be in [1, max_tokens={max_tokens}]")
    sizes: Counter[int] = Counter()
    waiting: deque[tuple[int, int]] = deque()
    now, arrived, step = 0.0, 0, 0
    # Sequences that decode, by the step they end before: (how many, keys of theirs when they end).
    ending: dict[int, tuple[int, int]] = {}
    decoding, keys = 0, 0
    left = 0  # Tokens of the first waiting prompt that are still to be computed; 0: it has not begun.
    while arrived < len(requests) or waiting or decoding:
        if not waiting and not decoding:
            now = max(now, requests[arrived][0])
        while arrived < len(requests) and requests[arrived][0] <= now:
            at, prompt, output = requests[arrived]
            if prompt < 1 or output < 0 or (arrived and at < requests[arrived - 1][0]):
                raise ValueError(f"request {arrived}: {requests[arrived]} needs a prompt and an arrival after the last")
            waiting.append((prompt, output))
            arrived += 1
        step += 1
        done, gone = ending.pop(step, (0, 0))
        decoding, keys = decoding - done, keys - gone
        tokens, keys = decoding, keys + decoding
        started = 0
        while waiting and tokens < max_tokens and decoding + started < max_seqs:
            prompt, output = waiting[0]
            left = left or prompt
            chunk = min(left, max_tokens - tokens)
            tokens, left = tokens + chunk, left - chunk
            if left:
                break
            waiting.popleft()
            if output > 1:
                # It decodes in the next output - 1 steps, with one more key in each.
                count, held = ending.get(step + output, (0, 0))
                ending[step + output] = (count + 1, held + prompt + output - 1)
                started, keys = started + 1, keys + prompt
        decoding += started
        if tokens:
            sizes[tokens] += 1
            now += step_time(tokens, keys)
    return {size: float(count) for size, count in sorted(sizes.items())}
