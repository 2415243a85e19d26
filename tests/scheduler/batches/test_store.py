import sqlite3

import pytest

from tests.scheduler.batches.store_fixtures import NOW, add_batch, lines, open_store, result
from xllm_compile.scheduler.batches.records import LineError
from xllm_compile.scheduler.batches.store import SCHEMA_VERSION, BatchStore, InUseError


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path)
    yield store
    store.close()


def started(store, num_lines=3, name="1"):
    batch = add_batch(store, name)
    assert store.start_batch(batch.number, lines(num_lines), NOW)
    return store.batch(batch.id)


def content(store, file_id):
    return store.read_output(store.file(file_id, NOW), 0, 1 << 20)[0].decode().splitlines()


def test_a_result_is_recorded_once(store):
    batch = started(store)
    store.record([result(batch, 2), result(batch, 2)])
    store.record([result(batch, 2), result(batch, 1, is_error=True)])
    after = store.batch(batch.id)
    assert (after.num_lines, after.num_completed, after.num_failed, after.output_tokens) == (3, 1, 1, 4)
    assert [each.number for each in store.pending_lines(batch.number, 0, 10)] == [3]
    assert store.num_pending_lines == 1


def test_a_result_of_a_batch_that_has_ended_is_dropped(store):
    batch = started(store)
    assert store.end_batch(batch.number, "cancelled", ("file-o", "file-e"), NOW)
    before = store.batch(batch.id)
    store.record([result(batch, 1)])
    assert store.batch(batch.id) == before and before.num_completed == 0
    assert store.end_batch(batch.number, "completed", ("file-x", "file-y"), NOW) is None


def test_outputs_are_in_the_order_of_the_input_and_read_in_pieces(store):
    batch = started(store, 5)
    for number in (4, 1, 5, 2):
        store.record([result(batch, number)])
    store.record([result(batch, 3, is_error=True)])
    ended = store.end_batch(batch.number, "completed", ("file-o", "file-e"), NOW)
    assert (ended.output_file_id, ended.error_file_id) == ("file-o", "file-e")
    output = store.file("file-o", NOW)
    pieces, after = [], 0
    while True:
        piece, after = store.read_output(output, after, 10)
        if not piece:
            break
        pieces.append(piece)
    assert len(pieces) == 2
    assert b"".join(pieces) == b"result 1\nresult 2\nresult 4\nresult 5\n"
    assert output.num_bytes == len(b"".join(pieces))
    assert content(store, "file-e") == ["result 3"]


def test_a_batch_without_failures_has_no_error_file(store):
    batch = started(store, 1)
    store.record([result(batch, 1)])
    ended = store.end_batch(batch.number, "completed", ("file-o", "file-e"), NOW)
    assert ended.error_file_id is None and store.file("file-e", NOW) is None


def test_a_status_changes_only_from_what_it_was(store):
    batch = add_batch(store)
    assert store.cancel_batch(batch, NOW)
    assert not store.cancel_batch(batch, NOW)
    assert not store.start_batch(batch.number, lines(3), NOW)
    assert not store.fail_batch(batch.number, [LineError(code="c", message="m")], NOW)
    assert store.pending_lines(batch.number, 0, 10) == []
    assert store.batch(batch.id).status == "cancelling"
    assert store.num_batches == {"validating": 0, "cancelling": 1}


def test_the_input_of_an_open_batch_is_kept(store):
    batch = started(store)
    file = store.file("file-1", NOW)
    with pytest.raises(InUseError, match=batch.id):
        store.delete_file(file)
    assert store.expired_files(NOW + 10_000_000) == []
    store.end_batch(batch.number, "cancelled", ("file-o", "file-e"), NOW)
    assert {each.id for each in store.expired_files(NOW + 10_000_000)} == {"file-1", "file-e"}
    store.delete_file(file)
    assert store.file("file-1", NOW) is None


def test_counts_are_those_of_a_store_that_is_opened_anew(store, tmp_path):
    def check():
        other = open_store(tmp_path)
        assert +other.num_batches == +store.num_batches
        assert (other.num_pending_lines, other.used_bytes) == (store.num_pending_lines, store.used_bytes)
        other.close()

    first, second = started(store), started(store, 4, "2")
    check()
    store.record([result(first, 1), result(first, 2, is_error=True), result(second, 1)])
    check()
    store.end_batch(first.number, "expired", ("file-o", "file-e"), NOW)
    check()
    store.delete_file(store.file("file-e", NOW))
    store.delete_file(store.file("file-1", NOW))
    check()
    store.cancel_batch(second, NOW)
    store.end_batch(second.number, "cancelled", ("file-p", "file-f"), NOW)
    check()


def test_attempts_are_kept_until_the_batch_ends(store, tmp_path):
    batch = add_batch(store)
    store.start_batch(batch.number, lines(3), NOW)
    store.note_attempts({(batch.number, 2): 1, (batch.number, 3): 1})
    # A line of a batch that has ended meanwhile.
    store.note_attempts({(batch.number, 2): 2, (batch.number + 1, 1): 1})
    store.close()
    again = open_store(tmp_path)
    assert [line.num_attempts for line in again.pending_lines(batch.number, 0, 9)] == [0, 2, 1]
    again.end_batch(batch.number, "completed", ("file-o", "file-e"), NOW)
    assert again._db.execute("SELECT COUNT(*) FROM attempts").fetchone()[0] == 0
    again.close()


def test_a_database_of_version_1_is_taken_up(store, tmp_path):
    batch = add_batch(store)
    store.start_batch(batch.number, lines(3), NOW)
    store.close()
    with sqlite3.connect(tmp_path / "batches.sqlite3") as database:
        database.execute("DROP TABLE attempts")
        database.execute("PRAGMA user_version = 1")
    again = open_store(tmp_path)
    again.note_attempts({(batch.number, 1): 1})
    assert [line.num_attempts for line in again.pending_lines(batch.number, 0, 9)] == [1, 0, 0]
    again.close()


def test_other_versions_and_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match="--batch-dir"):
        BatchStore(tmp_path / "text")
    open_store(tmp_path).close()
    with sqlite3.connect(tmp_path / "batches.sqlite3") as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(ValueError, match=f"version {SCHEMA_VERSION + 1}"):
        open_store(tmp_path)
