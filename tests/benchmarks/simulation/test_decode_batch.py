from tests.benchmarks.simulation.fixtures import requests
from xllm_compile.benchmarks.simulation.decode_batch import DecodeBatch


def batch_of(*outputs):
    batch, members = DecodeBatch(), requests(len(outputs), 1.0)
    for request, count in zip(members, outputs, strict=True):
        request.num_prompt_tokens, request.num_output_tokens, request.num_generated = 100, count, 1
        batch.add(request)
    return batch, members


def test_steps_at_once_are_as_good_as_one_by_one():
    (many, _), (single, members) = batch_of(5, 3, 9), batch_of(5, 3, 9)
    assert many.steps_to_end() == 2
    ended = many.advance(2)
    assert [request.number for request in ended] == [1]
    assert single.advance(1) == []
    assert single.advance(1) == [members[1]]
    assert many.num_context_tokens == single.num_context_tokens == 2 * 103
    assert [request.num_generated for request in many.members()] == [3, 3]
    assert many.steps_to_end() == 2


def test_who_leaves_and_comes_back_goes_on_where_it_was():
    batch, (first, second) = batch_of(5, 9)
    batch.advance(2)
    batch.remove(first)
    assert (first.num_generated, len(batch), batch.num_context_tokens) == (3, 1, 103)
    batch.advance(1)
    batch.add(first)
    assert batch.last() is first
    assert batch.steps_to_end() == 2
    assert batch.advance(2) == [first]
    assert first.num_generated == 5
    assert batch.members() == [second]
