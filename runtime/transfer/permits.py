"""Who may write where in this process's region, and who is writing right now."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from threading import Condition

from xllm_compile.runtime.transfer.transfer import TransferError

MIN_TOKEN_BYTES = 16


class RefusedError(Exception):
    """A write that is not permitted, or no longer. The message is for the sender."""


def token_id(token: bytes) -> bytes:
    """[16] what a token is called where others may listen."""
    return hashlib.blake2b(token, digest_size=16, person=b"xllm-kv-token").digest()


class Permit:
    """One token's ranges."""

    def __init__(self, token: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        self.token = token
        self.is_revoked = False
        self.writes: set[Write] = set()
        """Those under way."""
        self._begins: list[int] = []
        self._ends: list[int] = []
        for begin, num_bytes in sorted(ranges):
            if self._ends and begin <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], begin + num_bytes)
            else:
                self._begins.append(begin)
                self._ends.append(begin + num_bytes)

    def covers(self, offset: int, num_bytes: int) -> bool:
        at = bisect_right(self._begins, offset) - 1
        return at >= 0 and offset + num_bytes <= self._ends[at]


class Write:
    """A write under way. Its pages must not be used by others."""

    def __init__(self, permit: Permit, cut: Callable[[], None]) -> None:
        self.permit = permit
        self.cut = cut

    def check(self) -> None:
        """To be called now and then. Raises RefusedError once the token is revoked."""
        if self.permit.is_revoked:
            raise RefusedError("the token was revoked during the write")


class Permits:
    """The permits of one region. Thread-safe."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._permits: dict[bytes, Permit] = {}
        self._changed = Condition()

    def permit(self, token: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """See Receiver."""
        if len(token) < MIN_TOKEN_BYTES:
            raise ValueError(f"a token of {len(token)} bytes can be guessed; take {MIN_TOKEN_BYTES} random ones")
        for offset, num_bytes in ranges:
            if offset < 0 or num_bytes < 0 or offset + num_bytes > self._num_bytes:
                raise ValueError(f"range of {num_bytes} bytes at {offset} is not in the region's {self._num_bytes}")
        with self._changed:
            if token_id(token) in self._permits:
                raise ValueError("the token has a permit already; take a new one for each")
            self._permits[token_id(token)] = Permit(token, ranges)

    def revoke(self, token: bytes, timeout_s: float) -> None:
        """See Receiver."""
        name = token_id(token)
        with self._changed:
            permit = self._permits.get(name)
            if permit is None:
                return
            permit.is_revoked = True
            # With the lock, which a write needs to end: the connection has no other write yet.
            for write in permit.writes:
                write.cut()
            if not self._changed.wait_for(lambda: not permit.writes, timeout_s):
                raise TransferError(
                    f"a write to KV pages goes on {timeout_s:g} s after its token was revoked: its sender hangs;"
                    " these pages must stay unused until this instance is restarted"
                )
            # Only now: until then another call for the token has to wait as well.
            self._permits.pop(name, None)

    def find(self, name: bytes) -> Permit | None:
        """The permit of the token with that id."""
        with self._changed:
            return self._permits.get(name)

    def begin(self, permit: Permit, targets: Sequence[tuple[int, int]], cut: Callable[[], None]) -> Write:
        """Until `end` the (offset, num_bytes) are being written. cut, from any thread, has it end soon.

        Raises RefusedError.
        """
        for offset, num_bytes in targets:
            if not permit.covers(offset, num_bytes):
                raise RefusedError(f"the token does not permit to write {num_bytes} bytes at {offset}")
        write = Write(permit, cut)
        with self._changed:
            write.check()
            permit.writes.add(write)
        return write

    def end(self, write: Write) -> None:
        with self._changed:
            write.permit.writes.remove(write)
            self._changed.notify_all()
