"""The engine for asyncio: one daemon thread steps it, results reach their consumers on their own event loops.

The thread sleeps on a condition while there is nothing to do. After a step, all outputs for one event loop travel in
one ``call_soon_threadsafe``; when that loop has not yet run the last one, they join it.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Literal, TypeVar

from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.hand_over import HandOver
from xllm_compile.runtime.kv_exchange import NoTransferError
from xllm_compile.runtime.outputs import EngineStats, RequestOutput
from xllm_compile.runtime.policies.queue_bound import QueueFullError
from xllm_compile.runtime.reservations import Reservation, ReservationRequest
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.runtime.sequence import Request, num_queued_tokens
from xllm_compile.runtime.transfer.transfer import TransferError

logger = logging.getLogger(__name__)

# Tokenising this much text takes about a millisecond, and so does replaying so many tokens; more goes to a thread, so
# that the event loop stays responsive.
MAX_INLINE_CHARS = 4096
MAX_INLINE_TOKENS = 512

# More of them would only take turns with the model's own threads.
NUM_GRAMMAR_COMPILERS = 2

T = TypeVar("T")

PauseMode = Literal["keep", "wait", "abort"]
SleepMode = Literal["wait", "abort"]
SleepLevel = Literal[1, 2]


class EngineDeadError(RuntimeError):
    """The engine thread ended, by an error or by shutdown; the process should be restarted."""


class EngineDrainingError(RuntimeError):
    """The engine finishes what it has and takes nothing new; another instance should serve the request."""


class EngineAsleepError(RuntimeError):
    """The engine gave its memory back; it takes requests again once it is woken up."""


class RequestStream:
    """Outputs of one request, for one consumer. Closing it before the end aborts the request.

    Those that nobody has read yet are joined.
    """

    def __init__(self, engine: "AsyncEngine", request: Request, mailbox: "_Mailbox") -> None:
        self.request_id = request.request_id
        self.prompt_token_ids = request.prompt_token_ids
        self._engine = engine
        self._mailbox = mailbox
        self._kind = request.params.output_kind
        self._items: deque[RequestOutput | BaseException] = deque()
        self._has_items = asyncio.Event()
        self._is_ended = False

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._items:
            if self._is_ended:
                raise StopAsyncIteration
            self._has_items.clear()
            await self._has_items.wait()
        item = self._items.popleft()
        if isinstance(item, BaseException):
            self._is_ended = True
            raise item
        self._is_ended = item.finished
        return item

    async def aclose(self) -> None:
        """Stop listening; aborts the request unless its end was reached. Safe to call twice."""
        if not self._is_ended:
            self._is_ended = True
            self._items.clear()
            self._has_items.set()
            self._engine._leave(self)

    def _push(self, item: RequestOutput | BaseException) -> None:
        if self._is_ended:
            return
        if self._items and isinstance(item, RequestOutput):
            # A consumer that fell behind catches up in one step, and what is held is one output.
            held = self._items.pop()
            assert isinstance(held, RequestOutput), "nothing comes behind an error"
            if self._kind is RequestOutputKind.DELTA:
                held.join(item)
                item = held
        self._items.append(item)
        self._has_items.set()


class _Mailbox:
    """Carries items from the engine thread to one event loop with as few wake-ups as possible."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._items: list[tuple[RequestStream, RequestOutput | BaseException]] = []

    def post(self, items: list[tuple[RequestStream, RequestOutput | BaseException]]) -> bool:
        """From the engine thread. False when the loop is closed and nobody will ever read."""
        with self._lock:
            is_first = not self._items
            self._items += items
        if is_first:
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                return False
        return True

    def _deliver(self) -> None:
        with self._lock:
            items, self._items = self._items, []
        for stream, item in items:
            stream._push(item)


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
        self._is_asleep = is_asleep
        self._sleep_or_wake = threading.Lock()
        """Held while memory is given back or taken."""
        self._compilers = ThreadPoolExecutor(NUM_GRAMMAR_COMPILERS, thread_name_prefix="xllm-grammar")
        self._wake = threading.Condition()
        # Guarded by _wake:
        self._inbox: list[Request | str | None] = []
        """Requests to add and ids to abort, in order; None where a pause begins that lets those before it finish."""
        self._calls: list[partial[None]] = []
        """To be made between two steps."""
        self._streams: dict[str, RequestStream] = {}
        self._mailboxes: dict[asyncio.AbstractEventLoop, _Mailbox] = {}
        self._num_waiting = 0
        self._num_waiting_tokens = 0
        self._is_draining = False
        self._is_stopping = False
        self._is_paused = is_asleep
        self._holds_new = False
        """New requests stay in the inbox, until what the engine has is finished and it pauses."""
        self._error: BaseException | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._at_rest = threading.Event()
        """Paused, and nothing is on its way."""
        engine.watch(self._notify)
        engine.on_asked_for_pages(self._notify)
        self._thread = threading.Thread(target=self._run, name="xllm-engine", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        return self._error is None and not self._is_stopping and self._thread.is_alive()

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def error(self) -> BaseException | None:
        """What ended the engine thread, if an error did."""
        return self._error

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
        if self._error is not None or self._is_stopping:
            raise self._dead_error()
        make = partial(self.engine.make_request, request_id, prompt, params, prompt_text, resume, hand_over)
        if params.structured is not None:
            # Here the request waits for its grammar, and nobody else does.
            request = await loop.run_in_executor(self._compilers, make)
        elif _takes_long(prompt, resume):
            request = await asyncio.to_thread(make)
        else:
            request = make()
        with self._wake:
            # Before its KV is read: a request that is refused costs the disk nothing.
            self._check_admission(request)
        reading = self.engine.prefetch(request)
        if reading is not None:
            # Others are computed while this one's KV comes from disk.
            await asyncio.wrap_future(reading)
        if request.reservation_id:
            await self._claim(request)
        with self._wake:
            try:
                self._check_admission(request)
            except BaseException:
                self._post(partial(self.engine.give_up, request))
                raise
            stream = RequestStream(self, request, self._mailbox_of(loop))
            self._streams[request_id] = stream
            self._inbox.append(request)
            self._num_waiting += len(request.sequences)
            self._num_waiting_tokens += num_queued_tokens(request.sequences)
            self._idle.clear()
            self._wake.notify()
        return stream

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
        with self._wake:
            if request_id in self._streams:
                self._inbox.append(request_id)
                self._wake.notify()

    async def hand_over(self, request_id: str, target: HandOver) -> None:
        """See Engine.hand_over. Raises EngineDeadError, NoTransferError."""
        await self._call(partial(self.engine.hand_over, request_id, target))

    async def reserve(self, wanted: ReservationRequest) -> Reservation:
        """See Engine.reserve. Raises what `submit` raises, too. Cancelled, nothing stays reserved."""
        with self._wake:
            self._check_open()
        try:
            return await self._call(partial(self.engine.reserve, wanted))
        except asyncio.CancelledError:
            self._post(partial(self.engine.release, wanted.reservation_id))
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
        self._post(partial(self.engine.release_all, holder))

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
            self._post(partial(self.engine.give_up, request))
            raise

    async def _call(self, function: Callable[[], T]) -> T:
        """What the function returns in the engine's thread, between two steps. Raises EngineDeadError."""
        future: Future[T] = Future()
        with self._wake:
            self._check_alive()
            self._calls.append(partial(_fulfil, future, function))
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def _post(self, function: Callable[[], object]) -> None:
        """As `_call`, for a result that nobody waits for."""
        with self._wake:
            self._calls.append(partial(_fulfil, Future(), function))
            self._wake.notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def stats(self) -> EngineStats:
        return self.engine.stats()

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new, finish what runs, abort what is left after timeout_s. True when all finished in time.

        Ends a pause.
        """
        with self._wake:
            self._is_draining = True
        self.resume()
        if await asyncio.to_thread(self._idle.wait, timeout_s):
            return True
        with self._wake:
            self._inbox += list(self._streams)
            self._wake.notify()
        await asyncio.to_thread(self._idle.wait)
        return False

    @property
    def is_paused(self) -> bool:
        return self._is_paused or self._holds_new or None in self._inbox

    async def pause(self, mode: PauseMode = "keep") -> None:
        """Stop computing; returns when the device is idle and every token that was made has been sent.

        Requests stay, and new ones are taken and wait, until `resume`: with "keep" those that run stop where they are,
        with "wait" they finish first, with "abort" they are aborted. Raises EngineDeadError.
        """
        with self._wake:
            self._check_alive()
            self._at_rest.clear()
            if mode == "wait":
                self._inbox.append(None)
            else:
                self._is_paused = True
            if mode == "abort":
                self._inbox += list(self._streams)
            self._wake.notify()
        await asyncio.to_thread(self._at_rest.wait)
        with self._wake:
            self._check_alive()

    def resume(self) -> None:
        """Go on where `pause` stopped."""
        with self._wake:
            self._is_paused = self._holds_new = False
            self._inbox = [item for item in self._inbox if item is not None]
            # Whoever still waits for the pause need not.
            self._at_rest.set()
            self._wake.notify()

    @property
    def is_sleeping(self) -> bool:
        return self._is_asleep

    async def sleep(self, level: SleepLevel = 1, mode: SleepMode = "wait") -> None:
        """Take nothing new, pause as `pause` does, and give back the memory of the KV cache and of the weights.

        Level 1 leaves the weights to the system's page cache, level 2 has them read from disk again. Cached prefixes
        go, to the tiers below if there are any. Raises EngineDeadError, ValueError where requests that an earlier pause
        stopped hold KV on several ranks or in memory that several models share.
        """
        with self._wake:
            self._check_alive()
            self._is_asleep = True
        try:
            await self.pause(mode)
            # The engine's thread waits for the end of the pause.
            await asyncio.to_thread(self._give_memory_back, level == 2)
        except BaseException:
            with self._wake:
                self._is_asleep = False
            self.resume()
            raise

    def _give_memory_back(self, from_cache: bool) -> None:
        with self._sleep_or_wake:
            if self._is_asleep:
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
            with self._wake:
                self._is_asleep = False
        self.resume()

    def shutdown(self) -> None:
        """End the thread after its current step. Requests that still run fail with EngineDeadError."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._compilers.shutdown(wait=False)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_alive(self) -> None:
        if self._error is not None or self._is_stopping:
            raise self._dead_error()

    def _check_open(self) -> None:
        self._check_alive()
        if self._is_draining:
            raise EngineDrainingError("the engine is draining; send the request to another instance")
        if self._is_asleep:
            raise EngineAsleepError("the engine is asleep; wake it up, or send the request to another instance")

    def _check_admission(self, request: Request) -> None:
        self._check_open()
        if request.request_id in self._streams:
            raise ValueError(f"request_id={request.request_id!r} is already in use; choose another")
        if not request.reservation_id:
            # Else a place is kept for it, and it does not wait.
            self.engine.check_queue(request, num_waiting=self._num_waiting, num_waiting_tokens=self._num_waiting_tokens)

    def _mailbox_of(self, loop: asyncio.AbstractEventLoop) -> _Mailbox:
        if loop not in self._mailboxes:
            self._mailboxes = {old: box for old, box in self._mailboxes.items() if not old.is_closed()}
            self._mailboxes[loop] = _Mailbox(loop)
        return self._mailboxes[loop]

    def _dead_error(self) -> EngineDeadError:
        if self._error is None:
            return EngineDeadError("the engine was shut down")
        error = EngineDeadError(f"the engine died of {self._error!r}; see its log, then restart the process")
        error.__cause__ = self._error
        return error

    def _leave(self, stream: RequestStream) -> None:
        with self._wake:
            if self._streams.get(stream.request_id) is stream:
                # The id stays taken until the engine has let go of it.
                self._inbox.append(stream.request_id)
                self._wake.notify()

    def _run(self) -> None:
        try:
            while (work := self._receive()) is not None:
                self._send(work())
        except BaseException as err:
            logger.exception("the engine thread failed; all its requests fail with it")
            self._error = err
        finally:
            self._fail_all()

    def _receive(self) -> Callable[[], list[RequestOutput]] | None:
        """Apply what came in and say what is to be done; sleep while that is nothing. None when it is time to stop."""
        with self._wake:
            while not self._is_stopping:
                self._apply_inbox()
                due_s = self.engine.tend()
                if self._calls:
                    return self._make_calls
                if self._holds_new and not self.engine.has_work:
                    self._is_paused, self._holds_new = True, False
                if self._is_paused:
                    if not self.engine.is_settled:
                        return self.engine.settle
                    self._at_rest.set()
                elif self.engine.has_work:
                    return self.engine.step
                if self.engine.is_asked_for_pages:
                    return self.engine.give_pages
                if not self._streams:
                    self._idle.set()
                self._wake.wait(due_s)
            return None

    def _make_calls(self) -> list[RequestOutput]:
        with self._wake:
            calls, self._calls = self._calls, []
        for call in calls:
            call()
        return []

    def _apply_inbox(self) -> None:
        inbox, self._inbox = self._inbox, []
        aborted = {item for item in inbox if isinstance(item, str)}
        for item in inbox:
            if item is None:
                self._holds_new = True
            elif isinstance(item, str):
                self.engine.abort(item)
            elif self._holds_new and item.request_id not in aborted:
                self._inbox.append(item)
            else:
                self.engine.add(item)
        held = [item for item in self._inbox if isinstance(item, Request)]
        self._num_waiting = self.engine.num_waiting + sum(len(request.sequences) for request in held)
        self._num_waiting_tokens = self.engine.num_waiting_tokens + sum(
            num_queued_tokens(request.sequences) for request in held
        )

    def _send(self, outputs: list[RequestOutput]) -> None:
        by_mailbox: dict[_Mailbox, list[tuple[RequestStream, RequestOutput | BaseException]]] = {}
        with self._wake:
            for output in outputs:
                stream = self._streams.pop(output.request_id) if output.finished else self._streams[output.request_id]
                by_mailbox.setdefault(stream._mailbox, []).append((stream, output))
        for mailbox, items in by_mailbox.items():
            if not mailbox.post(items):
                self._drop_loop(mailbox)

    def _drop_loop(self, mailbox: _Mailbox) -> None:
        """The event loop is gone, and with it everybody who waited on it."""
        with self._wake:
            self._mailboxes.pop(mailbox.loop, None)
            self._inbox += [name for name, stream in self._streams.items() if stream._mailbox is mailbox]

    def _fail_all(self) -> None:
        with self._wake:
            self._is_stopping = True
            streams, self._streams = list(self._streams.values()), {}
            calls, self._calls = self._calls, []
            self._idle.set()
            self._at_rest.set()
        for stream in streams:
            stream._mailbox.post([(stream, self._dead_error())])
        for call in calls:
            # Whoever waits for it learns of the end, as all who come later do.
            if call.args[0].set_running_or_notify_cancel():
                call.args[0].set_exception(self._dead_error())


def _fulfil(future: "Future[T]", function: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except (ValueError, QueueFullError, NoTransferError) as err:
        future.set_exception(err)
    except BaseException as err:
        # Not about the call: a step failed, and the engine with it.
        future.set_exception(err)
        raise


def _takes_long(prompt: str | Sequence[int], resume: Resume | None) -> bool:
    """Whether making the request would keep the event loop from its other work."""
    num_chars = len(prompt) if isinstance(prompt, str) else 0
    num_tokens = len(resume.output_token_ids) if resume is not None else 0
    return num_chars > MAX_INLINE_CHARS or num_tokens > MAX_INLINE_TOKENS
