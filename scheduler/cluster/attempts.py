"""The attempts at serving one request: where it is placed, who refused it or was lost with it, and when it gives up."""

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.instance_link import InstanceLink
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.run import EndedEarlyError, InstanceLostError
from xllm_compile.scheduler.cluster.state import Placement
from xllm_compile.scheduler.cluster.token_log import TokenLog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FailoverConfig:
    max_losses: int = 5
    """Instances that may end with a request without a token between: it may be what ends them.

    One that answers again did not end, and one that drains ends by itself.
    """
    max_refusals: int = 8
    """Instances that may refuse a request: of very many that are busy not all are asked by each."""
    wait_s: float = 30.0
    """How long a request waits for an instance when there is none, or to know whether those it lost ended."""


class TryElsewhereError(Exception):
    """The attempt is over; why, is noted."""


class AbortedError(Exception):
    """The request was aborted while it waited."""


class Attempts:
    """Those of one request, and what the placer hears of it."""

    def __init__(self, cluster: Cluster, placer: Placer, log: TokenLog, config: FailoverConfig) -> None:
        self._cluster = cluster
        self._placer = placer
        self._log = log
        self._config = config
        self._key = uuid.uuid4().hex
        self._avoided: set[str] = set()
        """Incarnations that were lost."""
        # Since the last token:
        self._lost: set[InstanceLink] = set()
        """Instances that were lost while they had the request, unless they drained."""
        self._num_ended_early = 0
        """Instances that are well, and did not finish the request."""
        self._refusals: dict[str, errors.ApiError] = {}
        """By the incarnation that refused."""
        self.is_begun = False
        """An instance took it: its client is not sent away any more."""
        self.awaits_token = True
        """No token has come since it was placed."""
        self.is_aborted = False

    def abort(self) -> None:
        """Whoever waits in `place` need not."""
        self.is_aborted = True
        self._cluster.notify()

    async def place(self) -> Placement:
        """Raises AbortedError, and ApiError where no instance takes it or none comes in time."""
        await self._check_losses()
        deadline = time.monotonic() + self._config.wait_s
        while not self.is_aborted:
            if self._cluster.is_ready:
                placement = self._place_now()
                if placement is not None:
                    return placement
                await self._wait_for_room(self._soonest_refusal())
                continue
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise errors.no_instance()
            await self._cluster.wait_changed(left_s)
        raise AbortedError

    @contextmanager
    def noted(self, link: InstanceLink, *, has_request: bool = True) -> Iterator[None]:
        """Raises TryElsewhereError where the instance is lost, or refuses what another may take.

        has_request: whether it computes what is asked for, or is only asked something.
        """
        try:
            yield
        except InstanceLostError as err:
            self._lose(link, err)
            if has_request and not link.load.is_draining:
                self._suspect(link, err)
            raise TryElsewhereError from err
        except errors.ApiError as err:
            self._note_refusal(link, err)
            raise TryElsewhereError from err

    def note_token(self) -> None:
        """There is one."""
        self.is_begun = True
        self._lost.clear()
        self._num_ended_early = 0
        if self.awaits_token:
            self.awaits_token = False
            self._placer.first_token(self._key)

    def note_move(self, link: InstanceLink) -> None:
        """It decodes there from now on."""
        self._placer.moved(self._key, self._log.shape(), link.info.name)

    def finish(self) -> None:
        """It is over, in whatever way."""
        self._placer.finished(self._key)

    def _place_now(self) -> Placement | None:
        """None where all refused, or enough."""
        if len(self._refusals) >= self._config.max_refusals:
            return None
        shape = self._log.shape(is_begun=self.is_begun)
        cached = self._cluster.kv.match(shape.digests)
        self.awaits_token = True
        return self._placer.place(self._key, shape, self._cluster, cached, refused=self._refusals, lost=self._avoided)

    async def _wait_for_room(self, refusal: errors.ApiError) -> None:
        """Until those who refused may be asked again. Raises the refusal of a request that nobody took before."""
        if not self.is_begun:
            raise refusal
        again_s = time.monotonic() + (refusal.retry_after_s or errors.RETRY_AFTER_S)
        while not self.is_aborted and (left_s := again_s - time.monotonic()) > 0:
            await self._cluster.wait_changed(left_s)
        self._refusals.clear()

    def _soonest_refusal(self) -> errors.ApiError:
        """Of what they said, the soonest time to come back."""
        return min(self._refusals.values(), key=lambda err: (err.kind is not errors.OVERLOADED, err.retry_after_s or 0))

    def _lose(self, link: InstanceLink, err: InstanceLostError) -> None:
        self.is_begun = True
        self._cluster.stats.num_lost += 1
        self._avoided.add(link.info.incarnation)
        self._cluster.doubt(link)
        logger.warning("a request with %d tokens goes on elsewhere: %s", len(self._log.token_ids), err)

    def _suspect(self, link: InstanceLink, err: InstanceLostError) -> None:
        if isinstance(err, EndedEarlyError):
            self._num_ended_early += 1
        else:
            self._lost.add(link)

    async def _check_losses(self) -> None:
        """Raises ApiError where as many ended as may. Waits while that is not known: those that were stopped or cut off
        come back, and whoever is cut off itself loses all at once."""
        deadline = time.monotonic() + self._config.wait_s
        while not self.is_aborted:
            num_lost = self._num_ended_early + sum(not link.is_up for link in self._lost)
            if num_lost < self._config.max_losses:
                return
            num_ended = self._num_ended_early + sum(link.is_closed for link in self._lost)
            left_s = deadline - time.monotonic()
            if num_ended >= self._config.max_losses or left_s <= 0:
                message = f"The request lost {num_lost} instances without a token between; it may be the cause."
                raise errors.ApiError(errors.UNAVAILABLE, message, code="instances_lost")
            await self._cluster.wait_changed(left_s)

    def _note_refusal(self, link: InstanceLink, err: errors.ApiError) -> None:
        """Raises it where it is about the request and others would say the same."""
        if err.kind not in (errors.OVERLOADED, errors.UNAVAILABLE):
            raise err
        self._cluster.stats.num_refused += 1
        self._refusals[link.info.incarnation] = err
