"""Drafts from a second, smaller model with the same vocabulary, in the same process.

It sees a sequence's tokens late, when it is asked for a draft: then it computes
what it has not seen, and goes on from there, all sequences of the step together. Its KV cache is its own, with as many
slots as the target's; where there is none left, the sequence that drafted last longest ago gives its own up.

Greedy requests, and those with a seed, whose tokens must not depend on how many were drafted, get its most probable
tokens. The others get tokens drawn from its distribution under the request's own temperature, top-k, top-p and min-p.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from xllm_compile.runtime.candidates import Kept, request_candidates
from xllm_compile.runtime.decode_loop import DraftRunner
from xllm_compile.runtime.draw import invert
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.sampler import one_thread
from xllm_compile.runtime.speculative.proposer import NO_DRAFT, Draft, Speculation
from xllm_compile.runtime.step import Step


@dataclass(eq=False, slots=True)
class _Tenant:
    """What a slot holds of one sequence."""

    slot: int
    num_known: int = 0
    """The sequence's first tokens,"""
    drafted: list[int] = field(default_factory=list)
    """and these after them, which it may have got or not."""


@dataclass(eq=False, slots=True)
class _Job:
    """One sequence's part of a round of drafting."""

    sequence: Speculation
    slot: int
    length: int
    new_tokens: list[int]
    """To compute in the next step."""
    begin: int
    """Position of the first of them."""
    drafted: list[int]
    drawn_from: list[Kept] | None

    @property
    def num_left_steps(self) -> int:
        """Steps to go with a token each. What is not drawn is computed up to the draft's last token: where all of it is
        accepted, the next draft begins with one token again, and is one native call."""
        if self.drawn_from is not None:
            return self.length - len(self.drafted)
        return len(self.sequence.token_ids) + self.length - self.begin


class DraftModel:
    """A proposer on a model runner of its own."""

    is_costly = True

    def __init__(self, runner: DraftRunner, kv_cache: KVCache) -> None:
        self._runner = runner
        self._kv_cache = kv_cache
        self._tenants: OrderedDict[Speculation, _Tenant] = OrderedDict()
        """The last one drafted last."""
        self._random = np.random.default_rng()

    def observe(self, sequence: Speculation) -> int | None:
        """One kind: it always has a draft, for as long as the model takes texts of that length."""
        return 0 if len(sequence.token_ids) < self._runner.max_model_len else None

    def propose(self, sequences: Sequence[Speculation], lengths: Sequence[int]) -> list[Draft]:
        """See Proposer.propose. Raises RuntimeError when a kernel refuses its arguments."""
        jobs: list[_Job] = []
        for sequence, wanted in zip(sequences, lengths, strict=True):
            length = min(wanted, self._runner.max_model_len - len(sequence.token_ids))
            if length > 0 and self._has_room(sequence, len(sequence.token_ids) + length, len(jobs)):
                jobs.append(self._start(sequence, length))
        if jobs:
            self._catch_up(jobs)
            self._extend(jobs)
        drafts = {job.sequence: Draft(job.drafted, job.drawn_from) for job in jobs}
        return [drafts.get(sequence, NO_DRAFT) for sequence in sequences]

    def forget(self, sequence: Speculation) -> None:
        """The sequence ended."""
        tenant = self._tenants.pop(sequence, None)
        if tenant is not None:
            self._kv_cache.free(tenant.slot)

    def _has_room(self, sequence: Speculation, num_tokens: int, num_started: int) -> bool:
        """Give the sequence a slot with room for so many tokens, at the cost of any but the num_started last ones."""
        tenant = self._tenants.get(sequence)
        if tenant is None:
            if self._kv_cache.num_free_slots == 0:
                if len(self._tenants) == num_started:
                    return False
                self.forget(next(iter(self._tenants)))
            tenant = self._tenants[sequence] = _Tenant(self._kv_cache.allocate())
        self._tenants.move_to_end(sequence)
        num_more = num_tokens - self._kv_cache.length(tenant.slot)
        while num_more > 0 and not self._kv_cache.extend(tenant.slot, num_more):
            if len(self._tenants) == num_started + 1:
                self.forget(sequence)
                return False
            self.forget(next(iter(self._tenants)))
        return True

    def _start(self, sequence: Speculation, length: int) -> _Job:
        tenant = self._tenants[sequence]
        text = sequence.token_ids
        num_kept = tenant.num_known
        for drafted, token in zip(tenant.drafted, text[num_kept:], strict=False):
            if drafted != token:
                break
            num_kept += 1
        # At least the last token is computed: its logits are wanted. What was drafted and refused is overwritten.
        num_kept = min(num_kept, len(text) - 1)
        params = sequence.params
        is_drawn = not params.is_greedy and params.seed is None
        return _Job(sequence, tenant.slot, length, text[num_kept:], num_kept, [], [] if is_drawn else None)

    def _catch_up(self, jobs: Sequence[_Job]) -> None:
        """Compute what is missing but for a last part that fits one step, for all of them together."""
        limit = self._runner.max_num_batched_tokens // len(jobs)
        for job in jobs:
            while len(job.new_tokens) > limit:
                chunk, job.new_tokens = job.new_tokens[:limit], job.new_tokens[limit:]
                self._run([(job, chunk)], wants_logits=False)

    def _extend(self, jobs: Sequence[_Job]) -> None:
        active = list(jobs)
        while active:
            if all(len(job.new_tokens) == 1 and job.drawn_from is None for job in active):
                self._extend_greedily(active)
            else:
                logits = self._run([(job, job.new_tokens) for job in active], wants_logits=True)
                best = logits.numpy().argmax(axis=1).tolist()
                for row, job in enumerate(active):
                    token = best[row] if job.drawn_from is None else self._draw(logits[row], job)
                    job.drafted.append(token)
                    job.new_tokens = [token]
            active = [job for job in active if job.num_left_steps > 0]
        for job in jobs:
            tenant = self._tenants[job.sequence]
            tenant.num_known = len(job.sequence.token_ids)
            tenant.drafted = job.drafted[: job.begin - tenant.num_known]
            del job.drafted[job.length :]

    def _extend_greedily(self, jobs: Sequence[_Job]) -> None:
        """By as many tokens as all of them want, in one call."""
        num_steps = min(job.num_left_steps for job in jobs)
        step = self._step([(job, job.new_tokens) for job in jobs], wants_logits=True)
        chosen = self._runner.decode_greedily(step, num_steps)
        for job, tokens in zip(jobs, chosen.T.tolist(), strict=True):
            job.drafted += tokens
            job.new_tokens = tokens[-1:]
            job.begin += num_steps - 1

    def _draw(self, row: Tensor, job: _Job) -> int:
        assert job.drawn_from is not None
        with one_thread():
            kept = request_candidates(row, job.sequence.params)
        job.drawn_from.append(kept)
        return invert(kept, self._random.random())

    def _run(self, parts: Sequence[tuple[_Job, list[int]]], *, wants_logits: bool) -> Tensor:
        """Compute these tokens of each; the logits of each one's last."""
        return self._runner.execute(self._step(parts, wants_logits=wants_logits))

    def _step(self, parts: Sequence[tuple[_Job, list[int]]], *, wants_logits: bool) -> Step:
        """With these tokens of each, which are begun with it."""
        token_ids: list[int] = []
        positions: list[int] = []
        rope_len: list[int] = []
        seq_start, context_len = [0], []
        for job, tokens in parts:
            end = job.begin + len(tokens)
            token_ids += tokens
            positions += range(job.begin, end)
            num_prompt_tokens = job.sequence.num_prompt_tokens
            rope_len += [max(num_prompt_tokens, position + 1) for position in range(job.begin, end)]
            seq_start.append(len(token_ids))
            context_len.append(end)
            job.begin = end
        last_rows = [start - 1 for start in seq_start[1:]] if wants_logits else []
        return Step(
            token_ids=np.array(token_ids, dtype=np.int32),
            positions=np.array(positions, dtype=np.int32),
            rope_len=np.array(rope_len, dtype=np.int32),
            seq_start=np.array(seq_start, dtype=np.int32),
            context_len=np.array(context_len, dtype=np.int32),
            slot=np.array([job.slot for job, _ in parts], dtype=np.int32),
            logits_at=np.array(last_rows, dtype=np.int32),
        )
