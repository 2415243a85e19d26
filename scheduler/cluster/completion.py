"""One completion on a cluster: placed, handed over, and placed again where an instance is lost or refuses."""

import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from xllm_compile.runtime.outputs import CompletionOutput, Logprob, RequestMetrics
from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.cluster.attempts import AbortedError, Attempts, FailoverConfig, TryElsewhereError
from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.generate_messages import (
    completion_of,
    count_metrics,
    embed_message,
    prompt_logprobs_of,
)
from xllm_compile.scheduler.cluster.instance_link import InstanceLink
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.prefix_fetch import Fetched, fetch_prefix
from xllm_compile.scheduler.cluster.run import EndedEarlyError, InstanceLostError
from xllm_compile.scheduler.cluster.state import Fetch, InstanceInfo
from xllm_compile.scheduler.cluster.token_log import TokenLog
from xllm_compile.scheduler.proto import xllm_pb2
from xllm_compile.scheduler.tracing import NO_SPAN, Span

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Next:
    """Where a request goes on behind the instance that has it."""

    link: InstanceLink
    reservation: Any

    def release(self) -> None:
        self.link.release(self.reservation.reservation_id)


class Completion:
    """Iterate `outputs` once, or await `embedding`."""

    def __init__(
        self,
        cluster: Cluster,
        placer: Placer,
        log: TokenLog,
        metrics: RequestMetrics,
        config: FailoverConfig,
        span: Span = NO_SPAN,
    ) -> None:
        """metrics and span are the request's; this adds what the completion does."""
        self._cluster = cluster
        self._stats = cluster.stats
        self._placer = placer
        self._log = log
        self._metrics = metrics
        self._span = span
        self._attempts = Attempts(cluster, placer, log, config)
        self._running: tuple[InstanceLink, str] | None = None
        self._next: _Next | None = None
        self._is_moving = False
        self.index = log.index
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        """Known before the last output."""

    def abort(self) -> None:
        """End it: the last output says so."""
        self._attempts.abort()
        if self._running is not None:
            link, name = self._running
            link.abort(name)

    async def outputs(self) -> AsyncGenerator[CompletionOutput, None]:
        """What is new, until its end. Raises ApiError where no instance takes it."""
        try:
            name = "placement"
            while True:
                try:
                    with self._span.child(name) as span:
                        async with aclosing(self._attempt(span)) as outputs:
                            async for output in outputs:
                                yield output
                    return
                except TryElsewhereError as err:
                    name = "resume" if isinstance(err.__cause__, InstanceLostError) else "placement"
        except AbortedError:
            yield CompletionOutput(index=self.index, text="", token_ids=[], finish_reason="abort")
        finally:
            self._attempts.finish()

    async def embedding(self, pooling: PoolingParams) -> list[float]:
        """Of the prompt. Raises ApiError as `outputs` does."""
        try:
            while True:
                link = self._link((await self._attempts.place()).prefill)
                try:
                    with self._client_span(self._span, "embed", link) as span, self._attempts.noted(link):
                        answer = await link.embed(embed_message(self._log.prompt, pooling), span.carrier)
                        return list(answer.embedding)
                except TryElsewhereError:
                    continue
        except AbortedError:
            raise errors.ApiError(errors.UNAVAILABLE, "The server ended this request early.", code="aborted") from None
        finally:
            self._attempts.finish()

    async def _attempt(self, span: Span) -> AsyncGenerator[CompletionOutput, None]:
        placement = await self._attempts.place()
        span.set({"xllm.choice": self.index, "xllm.num_resumed_tokens": len(self._log.token_ids)})
        prefill, decode = self._link(placement.prefill), self._link(placement.decode)
        self._stats.num_placed += 1
        self._stats.num_resumed_tokens += len(self._log.token_ids)
        fetched = None if placement.fetch is None else await self._fetch(prefill, placement.fetch, span)
        try:
            async with aclosing(self._generate(prefill, decode, fetched, span)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            if fetched is not None and self._attempts.awaits_token:
                prefill.release(fetched.reservation_id)

    async def _generate(
        self, link: InstanceLink, decode: InstanceLink, fetched: Fetched | None, span: Span
    ) -> AsyncGenerator[CompletionOutput, None]:
        """Prefill on the link's instance, then wherever it is handed over to: where it decodes, or to who pulls it."""
        # Of this attempt: an instance may still hold an earlier one.
        request = self._log.request(uuid.uuid4().hex, is_begun=self._attempts.is_begun)
        if fetched is not None:
            request.resume.reservation_id = fetched.reservation_id
            request.resume.num_kv_tokens = fetched.num_kv_tokens
        name = "generate"
        claimed: _Next | None = None
        try:
            if link is not decode:
                self._stats.num_split += 1
                name = "prefill"
                self._next = _Next(decode, await self._reserve(decode, link.info, span))
                request.hand_over.reservation.CopyFrom(self._next.reservation)
            while True:
                is_handed_over, num_kv_tokens = False, 0
                async with aclosing(self._run(link, request, span, name)) as arrivals:
                    async for new, arrived_s in arrivals:
                        if claimed is not None and not _is_aborted(new):
                            # The sequence has the slot, or found none.
                            claimed = None
                        if isinstance(new, CompletionOutput):
                            yield self._take(new, arrived_s)
                            continue
                        is_handed_over, num_kv_tokens = _is_handed_over(new), new.num_kv_tokens
                        self._note_response(new)
                        for choice in new.choices:
                            yield self._take(completion_of(choice, self.index), arrived_s)
                if not is_handed_over:
                    return
                assert self._next is not None, "an instance hands over what it was told to"
                if link is decode:
                    self._stats.num_migrated += 1
                elif num_kv_tokens == self._next.reservation.num_tokens:
                    self._stats.num_handed_over += 1
                name = "decode"
                claimed, self._next = self._next, None
                link = decode = claimed.link
                request = self._log.request(uuid.uuid4().hex, is_begun=self._attempts.is_begun)
                request.resume.reservation_id = claimed.reservation.reservation_id
                # What a receiver cannot know: bytes that were never sent look like any others.
                request.resume.num_kv_tokens = num_kv_tokens
        finally:
            for held in (self._next, claimed):
                if held is not None:
                    held.release()
            self._next = None

    @property
    def offline_at(self) -> str | None:
        """The instance where it decodes as an offline request and may be moved from; else None."""
        if self._running is None or self._attempts.awaits_token or self._next is not None or self._is_moving:
            return None
        return self._running[0].info.name if self._log.is_offline else None

    @property
    def num_tokens(self) -> int:
        """Of prompt and output so far."""
        return self._log.num_tokens

    async def move(self, target: InstanceLink) -> None:
        """Have it go on there, with its KV; it stays if there is no room, or it ends or leaves meanwhile."""
        running = self._running
        assert running is not None and self.offline_at is not None
        self._is_moving = True
        try:
            with self._client_span(self._span, "reserve", target) as span:
                reservation = await target.reserve(self._reserve_request(running[0].info), span.carrier)
        except (InstanceLostError, errors.ApiError) as err:
            self._stats.num_migrations_refused += 1
            logger.debug("an offline request stays on %s: %s", running[0].info.name, err)
            return
        finally:
            self._is_moving = False
        following = _Next(target, reservation)
        if self._running is not running or self._attempts.is_aborted:
            following.release()
            return
        self._next = following
        self._attempts.note_move(target)
        link, name = running
        link.hand_over(name, reservation)

    async def _run(self, link: InstanceLink, request: Any, parent: Span, name: str) -> AsyncGenerator[Any, None]:
        """What comes of the instance (Run.next), and when it came. Raises TryElsewhereError where it is lost, refuses
        or ends the request early, AbortedError.
        """
        if self._attempts.is_aborted:
            raise AbortedError
        self._running = link, request.request_id
        try:
            with (
                self._client_span(parent, name, link) as span,
                self._attempts.noted(link),
                link.run(request, span.carrier) as run,
            ):
                while not run.is_over:
                    new = await run.next()
                    if run.is_over and _is_aborted(new) and not self._attempts.is_aborted:
                        # It is left out of the log: its text may be cut where the next token changes it.
                        raise EndedEarlyError(f"{link.info.name}: it ended the request early")
                    yield new, run.arrived_s
        finally:
            self._running = None

    async def _fetch(self, target: InstanceLink, fetch: Fetch, parent: Span) -> Fetched | None:
        """See fetch_prefix. Raises TryElsewhereError."""
        with self._client_span(parent, "fetch", target) as span, self._attempts.noted(target, has_request=False):
            return await fetch_prefix(
                self._link(fetch.source),
                target,
                self._log.all_token_ids,
                self._log.shape().digests,
                fetch,
                placer=self._placer,
                stats=self._stats,
                trace=span.carrier,
            )

    async def _reserve(self, link: InstanceLink, sender: InstanceInfo, parent: Span) -> Any:
        """Room there for the prompt's KV as the sender computes it. Raises TryElsewhereError."""
        with self._client_span(parent, "reserve", link) as span, self._attempts.noted(link, has_request=False):
            return await link.reserve(self._reserve_request(sender), span.carrier)

    def _reserve_request(self, sender: InstanceInfo) -> Any:
        shape = self._log.shape()
        return xllm_pb2.ReserveRequest(
            reservation_id=uuid.uuid4().hex,
            token_ids=self._log.all_token_ids,
            weights_key=sender.weights_key,
            kv_layout=sender.kv_layout,
            tpot_slo_ms=None if shape.tpot_slo_s is None or shape.is_offline else 1e3 * shape.tpot_slo_s,
            max_output_tokens=shape.max_output_tokens,
        )

    @staticmethod
    def _client_span(parent: Span, name: str, link: InstanceLink) -> Span:
        info = link.info
        return parent.child(name, {"xllm.instance": info.name, "server.address": info.address}, kind="CLIENT")

    def _take(self, output: CompletionOutput, arrived_s: float) -> CompletionOutput:
        if output.token_ids:
            self._note_token(arrived_s)
        return self._log.take(output, arrived_s)

    def _note_response(self, response: Any) -> None:
        """What it has beside tokens."""
        if response.prompt_logprobs:
            self.prompt_logprobs = prompt_logprobs_of(response.prompt_logprobs)
        if response.HasField("usage"):
            self.num_cached_tokens = max(self.num_cached_tokens, response.usage.cached_tokens)
            if response.HasField("metrics"):
                self._take_metrics(response.metrics)

    def _note_token(self, arrived_s: float) -> None:
        self._attempts.note_token()
        if self._metrics.first_token_s is None:
            self._metrics.first_token_s = arrived_s
        self._metrics.last_token_s = arrived_s

    def _take_metrics(self, message: Any) -> None:
        count_metrics(self._metrics, message)
        if self._metrics.scheduled_s is None and message.HasField("queue_time_ms"):
            self._metrics.scheduled_s = self._metrics.arrival_s + message.queue_time_ms / 1e3

    def _link(self, name: str) -> InstanceLink:
        link = self._cluster.link(name)
        assert link is not None, "a placement holds until the next await"
        return link


def _is_handed_over(response: Any) -> bool:
    if not response.HasField("usage"):
        return False
    return any(choice.finish_reason == xllm_pb2.FINISH_REASON_HANDED_OVER for choice in response.choices)


def _is_aborted(new: Any) -> bool:
    """Of what Run.next gave."""
    if isinstance(new, CompletionOutput):
        return False
    return any(choice.finish_reason == xllm_pb2.FINISH_REASON_ABORT for choice in new.choices)
