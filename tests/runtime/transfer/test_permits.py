import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest

from xllm_compile.runtime.transfer.permits import Permits, RefusedError, token_id
from xllm_compile.runtime.transfer.transfer import TransferError

TOKEN = b"t" * 16


def begin(permits, *targets, token=TOKEN, cut=lambda: None):
    permit = permits.find(token_id(token))
    assert permit is not None
    return permits.begin(permit, targets, cut)


def test_a_write_lies_in_the_permitted_ranges_whatever_their_order_and_joins():
    permits = Permits(1000)
    permits.permit(TOKEN, [(300, 100), (100, 100), (200, 50), (500, 0)])
    for offset, size in ((100, 150), (300, 100), (399, 1), (120, 0)):
        permits.end(begin(permits, (offset, size)))
    for offset, size in ((99, 2), (240, 11), (250, 1), (399, 2), (0, 1000), (500, 1), (1 << 63, 1 << 63)):
        with pytest.raises(RefusedError, match=f"{size} bytes at {offset}"):
            begin(permits, (100, 1), (offset, size))


def test_revoke_cuts_the_writes_under_way_and_waits_for_their_end():
    permits = Permits(1000)
    permits.permit(TOKEN, [(0, 1000)])
    other = secrets.token_bytes(16)
    permits.permit(other, [(0, 1000)])
    cuts: list[str | None] = []
    writes = [begin(permits, (0, 10), cut=lambda: cuts.append(None)) for _ in range(2)]
    undisturbed = begin(permits, (0, 10), token=other, cut=lambda: cuts.append("other"))
    with ThreadPoolExecutor(2) as pool:
        revoked = [pool.submit(permits.revoke, TOKEN, 60) for _ in range(2)]
        permits.end(writes[0])
        assert not any(future.done() for future in revoked)
        permits.end(writes[1])
        for future in revoked:
            future.result()
    assert cuts and set(cuts) == {None}
    with pytest.raises(RefusedError, match="revoked"):
        writes[0].check()
    undisturbed.check()
    assert permits.find(token_id(TOKEN)) is None
    permits.revoke(TOKEN, 0)


def test_a_write_that_does_not_end_keeps_its_pages_and_its_token_stays_refused():
    permits = Permits(1000)
    permits.permit(TOKEN, [(0, 1000)])
    write = begin(permits, (0, 1))
    with pytest.raises(TransferError, match="must stay unused"):
        permits.revoke(TOKEN, 0)
    with pytest.raises(RefusedError, match="revoked"):
        begin(permits, (0, 1))
    permits.end(write)
    permits.revoke(TOKEN, 0)


@pytest.mark.parametrize(
    ("token", "ranges", "message"),
    [
        (b"short", [(0, 1)], "5 bytes can be guessed"),
        (TOKEN, [(0, 1)], "a permit already"),
        (b"n" * 16, [(990, 11)], "11 bytes at 990 is not in the region's 1000"),
        (b"n" * 16, [(-1, 1)], "1 bytes at -1"),
        (b"n" * 16, [(1, -1)], "-1 bytes at 1"),
    ],
)
def test_a_permit_that_makes_no_sense_is_an_error(token, ranges, message):
    permits = Permits(1000)
    permits.permit(TOKEN, [(0, 10)])
    with pytest.raises(ValueError, match=message):
        permits.permit(token, ranges)
