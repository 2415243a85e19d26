"""Keys, entries and changes as etcd's messages have them."""

from typing import Any

from xllm_compile.scheduler.proto import etcd_pb2
from xllm_compile.scheduler.registry.registry import Change, Entry


def to_bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def to_key(key: bytes) -> str:
    # Whoever else writes there need not write UTF-8.
    return key.decode("utf-8", "surrogateescape")


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """key and range_end of all keys that begin with the prefix: the range ends before the prefix plus one."""
    key = to_bytes(prefix)
    kept = key.rstrip(b"\xff")
    if not kept:
        return key or b"\0", b"\0"
    return key, kept[:-1] + bytes([kept[-1] + 1])


def prefix_of(key: bytes, range_end: bytes) -> str | None:
    """The prefix whose keys the range is; None for any other range."""
    prefix = to_key(key) if key != b"\0" else ""
    return prefix if prefix_range(prefix) == (key, range_end) else None


def entry_of(kv: Any) -> Entry:
    return Entry(key=to_key(kv.key), value=kv.value, revision=kv.mod_revision, lease_id=kv.lease)


def kv_of(entry: Entry) -> etcd_pb2.KeyValue:
    """Without create_revision and version, which the registry does not keep."""
    key = to_bytes(entry.key)
    return etcd_pb2.KeyValue(key=key, value=entry.value, mod_revision=entry.revision, lease=entry.lease_id)


def change_of(event: Any) -> Change:
    is_put = event.type == etcd_pb2.Event.PUT
    entry = entry_of(event.kv) if is_put else None
    return Change(key=to_key(event.kv.key), entry=entry, revision=event.kv.mod_revision)


def event_of(change: Change) -> etcd_pb2.Event:
    if change.entry is not None:
        return etcd_pb2.Event(type=etcd_pb2.Event.PUT, kv=kv_of(change.entry))
    kv = etcd_pb2.KeyValue(key=to_bytes(change.key), mod_revision=change.revision)
    return etcd_pb2.Event(type=etcd_pb2.Event.DELETE, kv=kv)
