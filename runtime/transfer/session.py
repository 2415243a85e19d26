"""What sender and receiver say to each other on one connection, whatever way the bytes themselves take.

    receiver: magic, nonce
    sender:   nonce, proof that it has the secret
    receiver: the like proof, and what else a sender of its scheme must know
then, for each write:
    sender:   header, ranges; and the bytes, in a scheme that sends them here
    receiver: whether all of it is in its place, else why not

Tokens and the secret are never sent, only hashes that are keyed with them and with both nonces: who listens learns
nothing that lets him write, and no message is good twice. The KV itself is neither encrypted nor authenticated.
"""

import hmac
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from xllm_compile.runtime.transfer.permits import token_id
from xllm_compile.runtime.transfer.stream import ConnectionLostError, Stream
from xllm_compile.runtime.transfer.transfer import ByteRange, TransferError

_MAGIC = b"xllm-kv1"
_NONCE_BYTES, _PROOF_BYTES = 16, 32
_HEADER = struct.Struct("<I16s32s")
_RANGE = struct.Struct("<QQQ")
_REPLY = struct.Struct("<BI")
_MAX_RANGES = 1 << 16
_MAX_TEXT_BYTES = 1 << 16
_OK, _REFUSED = 0, 1


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """A write as the receiver reads it; who sent it is not proved yet."""

    token_id: bytes
    ranges: tuple[ByteRange, ...]
    proof: bytes
    signed: bytes

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.ranges)


class Session:
    """A connection whose two ends have proved that they know the secret."""

    def __init__(self, stream: Stream, key: bytes, details: bytes = b"") -> None:
        self.stream = stream
        self.details = details
        """What the receiver said about itself."""
        self._key = key
        self._num_writes = 0

    def request(self, token: bytes, ranges: Sequence[ByteRange]) -> bytes:
        """The message that announces the next write. Raises ValueError."""
        if len(ranges) > _MAX_RANGES:
            raise ValueError(f"{len(ranges)} ranges in one write, {_MAX_RANGES} is the most; write them in parts")
        packed = b"".join(_RANGE.pack(part.source, part.target, part.num_bytes) for part in ranges)
        return _HEADER.pack(len(ranges), token_id(token), self._proof(token, packed)) + packed

    def receive_request(self) -> WriteRequest:
        num_ranges, name, proof = _HEADER.unpack(self.stream.receive_bytes(_HEADER.size))
        if num_ranges > _MAX_RANGES:
            raise TransferError(f"{self.stream.peer} announces {num_ranges} ranges, {_MAX_RANGES} is the most")
        packed = self.stream.receive_bytes(num_ranges * _RANGE.size)
        ranges = tuple(
            ByteRange(source=source, target=target, num_bytes=num_bytes)
            for source, target, num_bytes in _RANGE.iter_unpack(packed)
        )
        return WriteRequest(name, ranges, proof, packed)

    def is_proved(self, request: WriteRequest, token: bytes) -> bool:
        """Whether the sender of the request has the token. To be asked once for each request."""
        return hmac.compare_digest(self._proof(token, request.signed), request.proof)

    def _proof(self, token: bytes, packed: bytes) -> bytes:
        # Counted by both ends: a write that is sent again proves nothing.
        self._num_writes += 1
        return hmac.digest(self._key + token, self._num_writes.to_bytes(8, "little") + packed, "sha256")

    def reply(self, refusal: str | None = None) -> None:
        text = (refusal or "").encode()[:_MAX_TEXT_BYTES]
        self.stream.send(_REPLY.pack(_OK if refusal is None else _REFUSED, len(text)) + text)

    def receive_reply(self) -> str | None:
        """Why the receiver refuses; None: it does not."""
        status, num_bytes = _REPLY.unpack(self.stream.receive_bytes(_REPLY.size))
        text = self.stream.receive_bytes(min(num_bytes, _MAX_TEXT_BYTES)).decode(errors="replace")
        return None if status == _OK else text


def greet_sender(stream: Stream, secret: bytes, details: bytes) -> Session:
    """The receiver's side of the beginning; details go to senders that have the secret. Raises TransferError."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    stream.send(_MAGIC + nonce)
    answer = stream.receive_bytes(_NONCE_BYTES + _PROOF_BYTES)
    nonces = nonce + answer[:_NONCE_BYTES]
    if not hmac.compare_digest(hmac.digest(secret, b"sender" + nonces, "sha256"), answer[_NONCE_BYTES:]):
        raise TransferError(f"{stream.peer} does not have this instance's secret")
    stream.send(hmac.digest(secret, b"receiver" + nonces, "sha256"), len(details).to_bytes(4, "little"), details)
    return Session(stream, hmac.digest(secret, b"session" + nonces, "sha256"))


def greet_receiver(stream: Stream, secret: bytes) -> Session:
    """The sender's side. Raises TransferError."""
    magic = stream.receive_bytes(len(_MAGIC))
    if magic != _MAGIC:
        raise TransferError(f"{stream.peer} is no KV receiver of this version (it begins with {magic!r})")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    nonces = stream.receive_bytes(_NONCE_BYTES) + nonce
    stream.send(nonce + hmac.digest(secret, b"sender" + nonces, "sha256"))
    try:
        proof = stream.receive_bytes(_PROOF_BYTES)
    except ConnectionLostError as err:
        raise TransferError(f"{err}: it has another secret") from None
    if not hmac.compare_digest(hmac.digest(secret, b"receiver" + nonces, "sha256"), proof):
        raise TransferError(f"{stream.peer} does not have this instance's secret")
    num_bytes = int.from_bytes(stream.receive_bytes(4), "little")
    if num_bytes > _MAX_TEXT_BYTES:
        raise TransferError(f"{stream.peer} sends {num_bytes} bytes about itself, {_MAX_TEXT_BYTES} is the most")
    details = stream.receive_bytes(num_bytes)
    return Session(stream, hmac.digest(secret, b"session" + nonces, "sha256"), details)
