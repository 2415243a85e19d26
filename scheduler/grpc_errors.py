"""Details of a gRPC error, as Google's error model has them."""

import grpc

from xllm_compile.scheduler.errors import ApiError

DETAILS_KEY = "grpc-status-details-bin"
"""The trailing metadata in which clients of every language look for google.rpc.Status."""


def retry_details(error: ApiError) -> bytes:
    """A google.rpc.Status with a RetryInfo, for an error that has retry_after_s."""
    # Imported by the first refusal only: starting up is not to wait for it.
    from google.protobuf.duration_pb2 import Duration
    from google.rpc.error_details_pb2 import RetryInfo
    from google.rpc.status_pb2 import Status

    code = getattr(grpc.StatusCode, error.kind.grpc).value[0]
    status = Status(code=code, message=error.message)
    status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=error.retry_after_s or 0)))
    return bytes(status.SerializeToString())
