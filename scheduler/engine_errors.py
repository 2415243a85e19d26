"""How the engine's errors read to a client."""

from xllm_compile.runtime.engine_thread import EngineAsleepError, EngineDeadError, EngineDrainingError
from xllm_compile.runtime.kv_exchange import NoTransferError
from xllm_compile.runtime.memory.shared_pages import SharedMemoryFullError
from xllm_compile.runtime.policies.queue_bound import QueueFullError
from xllm_compile.runtime.transfer.transfer import TransferError
from xllm_compile.scheduler import errors


def to_api_error(err: Exception) -> errors.ApiError:
    """The text of an unexpected error is not passed on: it may hold prompts or paths."""
    match err:
        case errors.ApiError():
            return err
        case QueueFullError():
            return errors.queue_full(str(err), err.retry_after_s)
        case EngineDrainingError():
            return errors.draining()
        case EngineAsleepError():
            return errors.asleep()
        case SharedMemoryFullError():
            return errors.memory_full(str(err))
        case EngineDeadError():
            return errors.engine_dead()
        case NoTransferError():
            return errors.ApiError(errors.PRECONDITION, str(err), code="no_transfer")
        case TransferError():
            return errors.ApiError(errors.UNAVAILABLE, str(err), code="transfer_failed")
        case ValueError():
            return errors.invalid(str(err))
        case _:
            return errors.internal()
