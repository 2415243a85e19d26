"""One completion on a cluster: placed, and placed again where its instance is lost."""

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from xllm_compile.runtime.outputs import CompletionOutput, Logprob, RequestMetrics
from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.generate_messages import count_metrics, embed_message, prompt_logprobs_of
from xllm_compile.scheduler.cluster.instance_link import InstanceLink, InstanceLostError
from xllm_compile.scheduler.cluster.state import Instance
from xllm_compile.scheduler.cluster.token_log import TokenLog

logger = logging.getLogger(__name__)

Place = Callable[[Sequence[Instance], TokenLog], Instance]
"""Chooses among instances that take work, at least one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FailoverConfig:
    max_losses: int = 5
    """Instances that a request may lose one after the other without a token between: it may be what ends them."""
    wait_s: float = 30.0
    """How long a request waits for an instance when there is none."""


class Completion:
    """Iterate `outputs` once."""

    def __init__(
        self, cluster: Cluster, place: Place, log: TokenLog, metrics: RequestMetrics, config: FailoverConfig
    ) -> None:
        """metrics are the request's; this adds what the completion does."""
        self._cluster = cluster
        self._place = place
        self._log = log
        self._metrics = metrics
        self._config = config
        self._is_aborted = False
        self._running: tuple[InstanceLink, str] | None = None
        self._num_losses = 0
        self._avoided: set[str] = set()
        """Incarnations that were lost."""
        self._refusals: dict[str, errors.ApiError] = {}
        """By the incarnation that refused."""
        self.index = log.index
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        """Known before the last output."""

    def abort(self) -> None:
        """End it: the last output says so."""
        self._is_aborted = True
        if self._running is not None:
            link, name = self._running
            link.abort(name)

    async def outputs(self) -> AsyncGenerator[CompletionOutput, None]:
        """What is new, until its end. Raises ApiError where no instance takes it."""
        while (instance := await self._find_instance()) is not None:
            with self._survive(instance):
                async with aclosing(self._run_on(instance)) as outputs:
                    async for output in outputs:
                        yield output
                return
        yield CompletionOutput(index=self.index, text="", token_ids=[], finish_reason="abort")

    async def embedding(self, pooling: PoolingParams) -> list[float]:
        """Of the prompt. Raises ApiError as `outputs` does."""
        while (instance := await self._find_instance()) is not None:
            with self._survive(instance):
                link = self._link(instance)
                return list((await link.embed(embed_message(self._log.prompt, pooling))).embedding)
        raise errors.ApiError(errors.UNAVAILABLE, "The server ended this request early.", code="aborted")

    @contextmanager
    def _survive(self, instance: Instance) -> Iterator[None]:
        """Take note of a lost instance, and of one that refuses: the request may be placed again."""
        try:
            yield
        except InstanceLostError as err:
            self._lose(instance, err)
        except errors.ApiError as err:
            if err.kind not in (errors.OVERLOADED, errors.UNAVAILABLE):
                raise
            self._refusals[instance.info.incarnation] = err

    def _link(self, instance: Instance) -> InstanceLink:
        link = self._cluster.link(instance.name)
        if link is None:
            raise InstanceLostError(f"{instance.name}: it left")
        return link

    async def _run_on(self, instance: Instance) -> AsyncGenerator[CompletionOutput, None]:
        link = self._link(instance)
        # Of this attempt: the instance may still hold an earlier one.
        request = self._log.request(uuid.uuid4().hex)
        self._running = link, request.request_id
        try:
            async with aclosing(link.run(request)) as responses:
                async for response in responses:
                    for output in self._take(response):
                        if output.finish_reason == "abort" and not self._is_aborted:
                            raise InstanceLostError(f"{instance.name}: it ended the request early")
                        yield output
        finally:
            self._running = None

    def _take(self, response: Any) -> list[CompletionOutput]:
        outputs = [self._log.take(choice) for choice in response.choices]
        if any(output.token_ids for output in outputs):
            now = time.monotonic()
            self._metrics.first_token_s = self._metrics.first_token_s or now
            self._metrics.last_token_s = now
            self._num_losses = 0
        if response.prompt_logprobs:
            self.prompt_logprobs = prompt_logprobs_of(response.prompt_logprobs)
        if response.HasField("usage"):
            self.num_cached_tokens = max(self.num_cached_tokens, response.usage.cached_tokens)
        if response.HasField("metrics"):
            self._take_metrics(response.metrics)
        return outputs

    def _take_metrics(self, message: Any) -> None:
        count_metrics(self._metrics, message)
        if self._metrics.scheduled_s is None and message.HasField("queue_time_ms"):
            self._metrics.scheduled_s = self._metrics.arrival_s + message.queue_time_ms / 1e3

    def _lose(self, instance: Instance, err: InstanceLostError) -> None:
        self._num_losses += 1
        self._avoided.add(instance.info.incarnation)
        logger.warning("a request with %d tokens goes on elsewhere: %s", len(self._log.token_ids), err)
        if self._num_losses >= self._config.max_losses:
            message = f"The request lost {self._num_losses} instances without a token between; it may be the cause."
            raise errors.ApiError(errors.UNAVAILABLE, message, code="instances_lost") from err

    async def _find_instance(self) -> Instance | None:
        """None where the request was aborted meanwhile. Raises ApiError when no instance comes in time."""
        deadline = time.monotonic() + self._config.wait_s
        while not self._is_aborted:
            usable = [instance for instance in self._cluster.instances() if instance.takes_work]
            open_to_it = [each for each in usable if each.info.incarnation not in self._refusals]
            if open_to_it:
                fresh = [each for each in open_to_it if each.info.incarnation not in self._avoided]
                return self._place(fresh or open_to_it, self._log)
            if usable:
                raise self._refusal()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                message = f"No instance of this service has been up for {self._config.wait_s:g} s."
                raise errors.ApiError(errors.UNAVAILABLE, message, code="no_instance", retry_after_s=1)
            await self._cluster.wait_changed(left_s)
        return None

    def _refusal(self) -> errors.ApiError:
        """All refused: of what they said, the soonest time to come back."""
        return min(self._refusals.values(), key=lambda err: (err.kind is not errors.OVERLOADED, err.retry_after_s or 0))


def least_loaded(instances: Sequence[Instance], log: TokenLog) -> Instance:
    """Where the fewest prompt tokens wait, then where the fewest sequences are."""
    return min(
        instances, key=lambda each: (each.load.num_waiting_tokens, each.load.num_running + each.load.num_waiting)
    )
