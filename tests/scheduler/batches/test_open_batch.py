import asyncio

from tests.scheduler.batches.store_fixtures import NOW, lines
from xllm_compile.scheduler.batches.open_batch import OpenBatch, next_batch
from xllm_compile.scheduler.batches.records import Batch


def open_batch(name, num_lines):
    batch = Batch(
        id=name, endpoint="", input_file_id="", completion_window="24h", created_at=NOW, expires_at=NOW + 86_400
    )
    entry = OpenBatch(batch=batch, is_started=True, is_read=True)
    entry.waiting.extend(lines(num_lines))
    return entry


def turns(entries, num_turns):
    """Whose lines start, when none ends."""
    order = []
    for turn in range(1, num_turns + 1):
        if (entry := next_batch(entries, 0.0)) is None:
            break
        entry.waiting.popleft()
        entry.turn = turn
        entry.num_unrecorded += 1
        order.append(entry.batch.id)
    return "".join(order)


def test_batches_take_turns():
    assert turns([open_batch("a", 9), open_batch("b", 2), open_batch("c", 9)], 9) == "abcabcaca"


def test_a_newcomer_gets_its_share_of_what_runs():
    long = open_batch("a", 20)
    assert turns([long], 6) == "aaaaaa"
    assert turns([long, open_batch("b", 20)], 8) == "bbbbbbab"


def test_batches_that_end_or_have_no_lines_have_no_turn():
    ending, checking = open_batch("a", 3), open_batch("b", 3)
    ending.ends_as, checking.is_started = "cancelled", False
    assert next_batch([ending, checking, open_batch("c", 0)], 0.0) is None


def test_a_batch_that_is_held_waits_for_itself_only():
    held, other = open_batch("a", 3), open_batch("b", 3)
    held.held_until_s = 5.0
    assert next_batch([held, other], 4.9) is other
    assert next_batch([held], 4.9) is None
    assert next_batch([held], 5.0) is held


async def test_a_batch_is_complete_when_its_last_result_is_on_disk():
    entry = open_batch("a", 1)
    assert not entry.is_complete
    entry.waiting.clear()
    task = asyncio.create_task(asyncio.sleep(0))
    entry.tasks.add(task)
    assert not entry.is_complete
    await task
    entry.tasks.clear()
    entry.num_unrecorded = 1
    assert not entry.is_complete
    entry.num_unrecorded = 0
    assert entry.is_complete
