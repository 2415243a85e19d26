"""The engine for asyncio: requests, reservations, pauses and sleep, awaited on any event loop.

A thread of its own steps it (engine_thread.py); outputs reach their consumers on their own event loops
(request_stream.py).
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Literal, TypeVar

from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.engine_thread import EngineThread, PauseMode
from xllm_compile.runtime.hand_over import HandOver
from xllm_compile.runtime.outputs import EngineStats, RequestOutput
from xllm_compile.runtime.request_stream import RequestStream
from xllm_compile.runtime.reservations import Reservation, ReservationRequest
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.sequence import Request
from xllm_compile.runtime.transfer.transfer import TransferError

logger = logging.getLogger(__name__)

# Tokenising this much text takes about a millisecond, and so does replaying so many tokens; more goes to a thread, so
# that the event loop stays responsive.
MAX_INLINE_CHARS = 4096
MAX_INLINE_TOKENS = 512

# More of them would only take turns with the model's own threads.
NUM_GRAMMAR_COMPILERS = 2

T = TypeVar("T")

SleepMode = Literal["wait", "abort"]
SleepLevel = Literal[1, 2]


class AsyncEngine:
    """Serves many concurrent requests on one Engine, which it owns from here on."""

    def __init__(
        self,
        engine: Engine,
        release_weights: Callable[[bool], None] = lambda from_cache: None,
        *,
        is_asleep: bool = False,
    ) -> None:
        """release_weights gives the weights' memory back; True has the system forget the file as well.

        is_asleep: the engine has no memory yet, until it is woken up.
        """
        self.engine = engine
        self._release_weights = release_weights
        self._sleep_or_wake = threading.Lock()
        """Held while memory is given back or taken."""
        self._compilers = ThreadPoolExecutor(NUM_GRAMMAR_COMPILERS, thread_name_prefix="xllm-grammar")
        self._thread = EngineThread(engine, is_asleep=is_asleep)

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_healthy

    @property
    def is_draining(self) -> bool:
        return self._thread.is_draining

    @property
    def error(self) -> BaseException | None:
        """What ended the engine's thread, if an error did."""
        return self._thread.error

    async def submit(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        prompt_text: str | None = None,
        resume: Resume | None = None,
        hand_over: HandOver | None = None,
    ) -> RequestStream:
        """Admit a request; its outputs come from the stream. Nothing is computed for a request that raises here.

        Raises ValueError on a bad prompt, option or an id in use; QueueFullError, EngineDrainingError,
        EngineDeadError. prompt_text is shown in the outputs beside a prompt of token ids; resume is what the request
        has generated elsewhere, hand_over where its KV goes with its next token.
        """
        loop = asyncio.get_running_loop()
        self._thread.check_alive()
        make = partial(self.engine.make_request, request_id, prompt, params, prompt_text, resume, hand_over)
        if params.structured is not None:
            # Here the request waits for its grammar, and nobody else does.
            request = await loop.run_in_executor(self._compilers, make)
        elif _takes_long(prompt, resume):
            request = await asyncio.to_thread(make)
        else:
            request = make()
        # Before its KV is read: a request that is refused costs the disk nothing.
        self._thread.check_admission(request)
        reading = self.engine.prefetch(request)
        if reading is not None:
            # Others are computed while this one's KV comes from disk.
            await asyncio.wrap_future(reading)
        if request.reservation_id:
            await self._claim(request)
        try:
            return self._thread.add(request, loop)
        except BaseException:
            self._thread.post(partial(self.engine.give_up, request))
            raise

    async def generate(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        prompt_text: str | None = None,
        resume: Resume | None = None,
        hand_over: HandOver | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request as they come. Leaving the loop early or cancelling aborts the request.

        Raises what `submit` raises, at the first step of the iteration.
        """
        stream = await self.submit(
            request_id, prompt, params, prompt_text=prompt_text, resume=resume, hand_over=hand_over
        )
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()

    async def abort(self, request_id: str) -> None:
        """End a request; its consumer gets a last output with finish_reason "abort". Unknown ids are ignored."""
        self._thread.abort(request_id)

    async def hand_over(self, request_id: str, target: HandOver) -> None:
        """See Engine.hand_over. Raises EngineDeadError, NoTransferError."""
        await self._call(partial(self.engine.hand_over, request_id, target))

    async def reserve(self, wanted: ReservationRequest) -> Reservation:
        """See Engine.reserve. Raises what `submit` raises, too. Cancelled, nothing stays reserved."""
        self._thread.check_open()
        try:
            return await self._call(partial(self.engine.reserve, wanted))
        except asyncio.CancelledError:
            self._thread.post(partial(self.engine.release, wanted.reservation_id))
            raise

    async def send_prefix(self, digests: Sequence[bytes], target: HandOver) -> int:
        """See Engine.send_prefix; returns when nothing more is on its way. A draining engine sends, too.

        Raises what it raises, and EngineDeadError. Cancelled, what is on its way goes on until its receiver ends it.
        """
        sent = await self._call(partial(self.engine.send_prefix, digests, target))
        return await asyncio.shield(asyncio.wrap_future(sent))

    async def release(self, reservation_id: str) -> bool:
        """Returns when nothing writes to its pages any more; False where there is none of that id, or it was claimed.

        Raises EngineDeadError, NoTransferError, TransferError when its writer cannot be stopped.
        """
        revoked = await self._call(partial(self.engine.release, reservation_id))
        if revoked is None:
            return False
        await asyncio.shield(asyncio.wrap_future(revoked))
        return True

    def release_all(self, holder: str) -> None:
        """Give up what the holder has reserved and no request has claimed, soon."""
        self._thread.post(partial(self.engine.release_all, holder))

    async def _claim(self, request: Request) -> None:
        """Have the KV that was sent for the request to itself. Where that is not possible it computes all of it."""
        try:
            revoked = await self._call(partial(self.engine.claim, request))
            if revoked is None:
                logger.info("request %s: there is no reservation %s", request.request_id, request.reservation_id)
                request.reservation_id = ""
                return
            # The revocation goes on whatever becomes of this request.
            with suppress(TransferError):
                await asyncio.shield(asyncio.wrap_future(revoked))
        except asyncio.CancelledError:
            self._thread.post(partial(self.engine.give_up, request))
            raise

    async def _call(self, function: Callable[[], T]) -> T:
        """What the function returns in the engine's thread: see EngineThread.call."""
        return await asyncio.wrap_future(self._thread.call(function))

    def stats(self) -> EngineStats:
        return self.engine.stats()

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new, finish what runs, abort what is left after timeout_s. True when all finished in time.

        Ends a pause.
        """
        self._thread.start_draining()
        if await asyncio.to_thread(self._thread.idle.wait, timeout_s):
            return True
        self._thread.abort_all()
        await asyncio.to_thread(self._thread.idle.wait)
        return False

    @property
    def is_paused(self) -> bool:
        return self._thread.is_paused

    async def pause(self, mode: PauseMode = "keep") -> None:
        """Stop computing; returns when the device is idle and every token that was made has been sent.

        Requests stay, and new ones are taken and wait, until `resume`: with "keep" those that run stop where they are,
        with "wait" they finish first, with "abort" they are aborted. Raises EngineDeadError.
        """
        self._thread.pause(mode)
        await asyncio.to_thread(self._thread.at_rest.wait)
        self._thread.check_alive()

    def resume(self) -> None:
        """Go on where `pause` stopped."""
        self._thread.resume()

    @property
    def is_sleeping(self) -> bool:
        return self._thread.is_asleep

    async def sleep(self, level: SleepLevel = 1, mode: SleepMode = "wait") -> None:
        """Take nothing new, pause as `pause` does, and give back the memory of the KV cache and of the weights.

        Level 1 leaves the weights to the system's page cache, level 2 has them read from disk again. Cached prefixes
        go, to the tiers below if there are any. Raises EngineDeadError, ValueError where requests that an earlier pause
        stopped hold KV on several ranks or in memory that several models share.
        """
        self._thread.fall_asleep()
        try:
            await self.pause(mode)
            # The engine's thread waits for the end of the pause.
            await asyncio.to_thread(self._give_memory_back, level == 2)
        except BaseException:
            self._thread.awaken()
            raise

    def _give_memory_back(self, from_cache: bool) -> None:
        with self._sleep_or_wake:
            if self._thread.is_asleep:
                # First what may be refused.
                self._release_weights(from_cache)
                self.engine.release_memory()

    def wake_up(self) -> None:
        """Take requests again; what was given back comes as it is needed. As in vLLM this ends a pause, too.

        Where several models share the memory, waits until they have made room. Raises SharedMemoryFullError where they
        cannot, and sleeps on.
        """
        with self._sleep_or_wake:
            self.engine.take_memory()
            self._thread.awaken()

    def shutdown(self) -> None:
        """End the thread after its current step. Requests that still run fail with EngineDeadError."""
        self._compilers.shutdown(wait=False)
        self._thread.stop()


def _takes_long(prompt: str | Sequence[int], resume: Resume | None) -> bool:
    """Whether making the request would keep the event loop from its other work."""
    num_chars = len(prompt) if isinstance(prompt, str) else 0
    num_tokens = len(resume.output_token_ids) if resume is not None else 0
    return num_chars > MAX_INLINE_CHARS or num_tokens > MAX_INLINE_TOKENS
