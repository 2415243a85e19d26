"""Keeps an instance's part of the KV index as the instance says that it is."""

import asyncio
import logging
from typing import Any

import grpc
import grpc.aio

from xllm_compile.runtime.kv_events import KVTier
from xllm_compile.scheduler.cluster.kv_index import KVHolder, block_keys
from xllm_compile.scheduler.proto import xllm_pb2

logger = logging.getLogger(__name__)

RETRY_S = 0.5


async def watch_kv(instance: Any, holder: KVHolder, *, incarnation: str, metadata: Any) -> None:
    """Follow the instance, a stub, until cancelled. What it had stays known while it does not answer."""
    while True:
        request = xllm_pb2.WatchKvRequest(sequence=holder.place, incarnation=incarnation)
        messages = instance.WatchKv(request, metadata=metadata)
        try:
            async for message in messages:
                if not apply_events(holder, message, incarnation=incarnation):
                    break
        except grpc.aio.AioRpcError as err:
            if err.code() is grpc.StatusCode.UNIMPLEMENTED:
                logger.warning("instance %s does not say what KV it has; its prefixes are not counted on", holder.name)
                return
        except ValueError as err:
            # Of a later version, perhaps.
            logger.warning("what instance %s says of its KV is no use: %s; it is not counted on", holder.name, err)
            holder.clear()
            return
        finally:
            messages.cancel()
        await asyncio.sleep(RETRY_S)


def apply_events(holder: KVHolder, message: Any, *, incarnation: str) -> bool:
    """Take one KvEvents over. False where it does not follow what came before: watch again, from holder.place.

    Raises ValueError on a tier that this version does not know, and on digests that end early.
    """
    if message.incarnation != incarnation:
        return False
    if message.is_snapshot:
        holder.clear()
    elif message.sequence != holder.place:
        return False
    for event in message.events:
        change = holder.remove if event.is_removed else holder.store
        change(KVTier(event.tier), block_keys(event.digests))
    holder.place = message.next_sequence
    return True
