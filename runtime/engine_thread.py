"""The thread that steps an engine, and what other threads may ask of it: requests, aborts, calls between two steps.

It sleeps on a condition while there is nothing to do. Everything but its own loop may be called from any thread, and
returns at once.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Literal, TypeVar

from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.kv_exchange import NoTransferError
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.policies.queue_bound import QueueFullError
from xllm_compile.runtime.request_stream import Mailbox, RequestStream
from xllm_compile.runtime.sequence import Request, num_queued_tokens

logger = logging.getLogger(__name__)

T = TypeVar("T")

PauseMode = Literal["keep", "wait", "abort"]


class EngineDeadError(RuntimeError):
    """The engine thread ended, by an error or by shutdown; the process should be restarted."""


class EngineDrainingError(RuntimeError):
    """The engine finishes what it has and takes nothing new; another instance should serve the request."""


class EngineAsleepError(RuntimeError):
    """The engine gave its memory back; it takes requests again once it is woken up."""


class EngineThread:
    """Owns the engine from here on."""

    def __init__(self, engine: Engine, *, is_asleep: bool = False) -> None:
        self._engine = engine
        self.idle = threading.Event()
        """No request is open."""
        self.idle.set()
        self.at_rest = threading.Event()
        """Paused, and nothing is on its way."""
        self._wake = threading.Condition()
        # Guarded by _wake:
        self._inbox: list[Request | str | None] = []
        """Requests to add and ids to abort, in order; None where a pause begins that lets those before it finish."""
        self._calls: list[partial[None]] = []
        """To be made while no step is being planned."""
        self._streams: dict[str, RequestStream] = {}
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        self._num_waiting = 0
        self._num_waiting_tokens = 0
        self._is_draining = False
        self._is_asleep = is_asleep
        self._is_stopping = False
        self._is_paused = is_asleep
        self._holds_new = False
        """New requests stay in the inbox, until what the engine has is finished and it pauses."""
        self._error: BaseException | None = None
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
    def is_asleep(self) -> bool:
        return self._is_asleep

    @property
    def is_paused(self) -> bool:
        return self._is_paused or self._holds_new or None in self._inbox

    @property
    def error(self) -> BaseException | None:
        """What ended the thread, if an error did."""
        return self._error

    def check_alive(self) -> None:
        """Raises EngineDeadError."""
        if self._error is not None or self._is_stopping:
            raise self._dead_error()

    def check_open(self) -> None:
        """Raises EngineDeadError, EngineDrainingError, EngineAsleepError where it takes nothing new."""
        with self._wake:
            self.check_alive()
            if self._is_draining:
                raise EngineDrainingError("the engine is draining; send the request to another instance")
            if self._is_asleep:
                raise EngineAsleepError("the engine is asleep; wake it up, or send the request to another instance")

    def check_admission(self, request: Request) -> None:
        """Raises what `check_open` raises, ValueError for an id in use, QueueFullError."""
        with self._wake:
            self.check_open()
            if request.request_id in self._streams:
                raise ValueError(f"request_id={request.request_id!r} is already in use; choose another")
            if not request.reservation_id:
                # Else a place is kept for it, and it does not wait.
                self._engine.check_queue(
                    request, num_waiting=self._num_waiting, num_waiting_tokens=self._num_waiting_tokens
                )

    def add(self, request: Request, loop: asyncio.AbstractEventLoop) -> RequestStream:
        """Its outputs, for a consumer on that event loop. Raises what `check_admission` raises."""
        with self._wake:
            self.check_admission(request)
            stream = RequestStream(request, self._mailbox_of(loop), self._leave)
            self._streams[request.request_id] = stream
            self._inbox.append(request)
            self._num_waiting += len(request.sequences)
            self._num_waiting_tokens += num_queued_tokens(request.sequences)
            self.idle.clear()
            self._wake.notify()
        return stream

    def abort(self, request_id: str) -> None:
        """Its consumer gets a last output with finish_reason "abort". Unknown ids are ignored."""
        with self._wake:
            if request_id in self._streams:
                self._inbox.append(request_id)
                self._wake.notify()

    def abort_all(self) -> None:
        """All that are open now."""
        with self._wake:
            self._inbox += list(self._streams)
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """What the function returns, soon, in the engine's thread. Raises EngineDeadError, also in the future.

        It does not wait for the device, unless the function does: who takes over a sequence claims its KV first, and
        would be a step late.
        """
        future: Future[T] = Future()
        with self._wake:
            self.check_alive()
            self._calls.append(partial(_fulfil, future, function))
            self._wake.notify()
        self._engine.interrupt()
        return future

    def post(self, function: Callable[[], object]) -> None:
        """As `call`, for a result that nobody waits for."""
        with self._wake:
            self._calls.append(partial(_fulfil, Future(), function))
            self._wake.notify()

    def pause(self, mode: PauseMode) -> None:
        """Stop computing, soon: see `at_rest`. Raises EngineDeadError.

        "keep" stops those that run where they are, "wait" lets them finish, "abort" ends them.
        """
        with self._wake:
            self.check_alive()
            self.at_rest.clear()
            if mode == "wait":
                self._inbox.append(None)
            else:
                self._is_paused = True
            if mode == "abort":
                self._inbox += list(self._streams)
            self._wake.notify()

    def resume(self) -> None:
        """Go on where `pause` stopped."""
        with self._wake:
            self._is_paused = self._holds_new = False
            self._inbox = [item for item in self._inbox if item is not None]
            # Whoever still waits for the pause need not.
            self.at_rest.set()
            self._wake.notify()

    def start_draining(self) -> None:
        """Take nothing new from now on. Ends a pause."""
        with self._wake:
            self._is_draining = True
        self.resume()

    def fall_asleep(self) -> None:
        """Take nothing new until `awaken`. Raises EngineDeadError."""
        with self._wake:
            self.check_alive()
            self._is_asleep = True

    def awaken(self) -> None:
        """Take requests again. Ends a pause."""
        with self._wake:
            self._is_asleep = False
        self.resume()

    def stop(self) -> None:
        """End it after its current step. Requests that still run fail with EngineDeadError."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _mailbox_of(self, loop: asyncio.AbstractEventLoop) -> Mailbox:
        if loop not in self._mailboxes:
            self._mailboxes = {old: box for old, box in self._mailboxes.items() if not old.is_closed()}
            self._mailboxes[loop] = Mailbox(loop)
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
                due_s = self._engine.tend()
                if self._calls:
                    return self._make_calls
                if self._holds_new and not self._engine.has_work:
                    self._is_paused, self._holds_new = True, False
                if self._is_paused:
                    if not self._engine.is_settled:
                        return self._engine.settle
                    self.at_rest.set()
                elif self._engine.has_work:
                    return self._engine.step
                if self._engine.is_asked_for_pages:
                    return self._engine.give_pages
                if not self._streams:
                    self.idle.set()
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
                self._engine.abort(item)
            elif self._holds_new and item.request_id not in aborted:
                self._inbox.append(item)
            else:
                self._engine.add(item)
        held = [item for item in self._inbox if isinstance(item, Request)]
        self._num_waiting = self._engine.num_waiting + sum(len(request.sequences) for request in held)
        self._num_waiting_tokens = self._engine.num_waiting_tokens + sum(
            num_queued_tokens(request.sequences) for request in held
        )

    def _send(self, outputs: list[RequestOutput]) -> None:
        by_mailbox: dict[Mailbox, list[tuple[RequestStream, RequestOutput | BaseException]]] = {}
        with self._wake:
            for output in outputs:
                stream = self._streams.pop(output.request_id) if output.finished else self._streams[output.request_id]
                by_mailbox.setdefault(stream.mailbox, []).append((stream, output))
        for mailbox, items in by_mailbox.items():
            if not mailbox.post(items):
                self._drop_loop(mailbox)

    def _drop_loop(self, mailbox: Mailbox) -> None:
        """The event loop is gone, and with it everybody who waited on it."""
        with self._wake:
            self._mailboxes.pop(mailbox.loop, None)
            self._inbox += [name for name, stream in self._streams.items() if stream.mailbox is mailbox]

    def _fail_all(self) -> None:
        with self._wake:
            self._is_stopping = True
            streams, self._streams = list(self._streams.values()), {}
            calls, self._calls = self._calls, []
            self.idle.set()
            self.at_rest.set()
        for stream in streams:
            stream.mailbox.post([(stream, self._dead_error())])
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
