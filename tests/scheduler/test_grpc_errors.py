from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from xllm_compile.runtime.policies.queue_bound import QueueFullError
from xllm_compile.scheduler.engine_errors import to_api_error
from xllm_compile.scheduler.grpc_errors import retry_details


def test_refused_clients_hear_when_to_come_back():
    for predicted_s, told_s in ((0.01, 1), (2.0, 2), (2.1, 3)):
        error = to_api_error(QueueFullError("full", predicted_s))
        assert error.retry_after_s == told_s
        status = Status.FromString(retry_details(error))
        assert (status.code, status.message) == (8, "full")
        info = RetryInfo()
        assert status.details[0].Unpack(info)
        assert info.retry_delay.seconds == told_s
