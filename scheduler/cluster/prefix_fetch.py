"""KV that another instance has, brought to where a request is prefilled: reserved there, sent, and taken by `resume`.

Whatever goes wrong with it is no error of the request: what has not arrived is computed.
"""

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.cluster.instance_link import InstanceLink
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.run import InstanceLostError
from xllm_compile.scheduler.cluster.state import Fetch
from xllm_compile.scheduler.cluster.stats import ClusterStats
from xllm_compile.scheduler.proto import xllm_pb2

logger = logging.getLogger(__name__)

# Beyond the wait for the copy: until the request itself is there to claim it.
_CLAIM_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """For Resume."""

    reservation_id: str
    num_kv_tokens: int
    """As the sender says."""


async def fetch_prefix(
    source: InstanceLink,
    target: InstanceLink,
    token_ids: Sequence[int],
    digests: Sequence[bytes],
    fetch: Fetch,
    *,
    placer: Placer,
    stats: ClusterStats,
    trace: Mapping[str, str],
) -> Fetched | None:
    """Have what the source has of the prompt sent to the target.

    digests: of all of the prompt's blocks. trace: the carrier of a span. None where the target has no room now. Raises
    InstanceLostError where the target is lost. Cancelled, nothing stays reserved.
    """
    stats.num_fetches += 1
    wait_s, began_s = placer.wait_s(fetch), time.monotonic()
    reservation_id = uuid.uuid4().hex
    request = xllm_pb2.ReserveRequest(
        reservation_id=reservation_id,
        token_ids=token_ids,
        weights_key=source.info.weights_key,
        kv_layout=source.info.kv_layout,
        timeout_ms=int((wait_s + _CLAIM_S) * 1e3),
    )
    try:
        reservation = await target.reserve(request, trace)
    except errors.ApiError as err:
        stats.num_failed_fetches += 1
        logger.debug("%s takes no KV from %s: %s", target.info.name, source.info.name, err.message)
        return None
    num_asked, num_there = fetch.num_tokens - reservation.num_cached_tokens, reservation.num_cached_tokens
    num_blocks = fetch.num_tokens // source.info.block_tokens
    try:
        if num_asked > 0:
            asked = xllm_pb2.SendPrefixRequest(digests=b"".join(digests[:num_blocks]), reservation=reservation)
            num_there = (await source.send_prefix(asked, wait_s, trace)).num_kv_tokens
            num_asked = num_there - reservation.num_cached_tokens
        if num_asked > 0:
            placer.copied(source.info, target.info, num_asked, time.monotonic() - began_s)
            stats.num_fetched_tokens += num_asked
    except InstanceLostError as err:
        logger.warning("%d tokens of KV are computed instead of fetched: %s", num_asked, err)
        if (took_s := time.monotonic() - began_s) >= wait_s:
            # Sooner it says nothing of how long copies take.
            placer.copied(source.info, target.info, num_asked, took_s)
    except errors.ApiError as err:
        logger.debug("%s sends no KV to %s: %s", source.info.name, target.info.name, err.message)
    except BaseException:
        target.release(reservation_id)
        raise
    stats.num_failed_fetches += num_there < fetch.num_tokens
    return Fetched(reservation_id=reservation_id, num_kv_tokens=num_there)
