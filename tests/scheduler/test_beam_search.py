"""Beam search: against trying everything, and as clients get it."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compile.runtime.outputs import Logprob
from xllm_compile.scheduler.beam_search import MAX_BEAM_WIDTH, BeamSearch, BeamSearchParams, score

EOS = 0
VOCABULARY = range(4)


def toy_model(seed):
    """Log-probabilities of the next token after any tokens."""

    def next_tokens(tokens):
        weights = [1 + hash((seed, tokens, token)) % 97 for token in VOCABULARY]
        total = sum(weights)
        ranked = sorted(VOCABULARY, key=lambda token: -weights[token])
        return {
            token: Logprob(logprob=math.log(weights[token] / total), rank=rank, decoded_token=str(token))
            for rank, token in enumerate(ranked, start=1)
        }

    return next_tokens


def search(model, stop_early=True, **options):
    params = BeamSearchParams(**options)
    beams = BeamSearch(params=params, eos_token_ids=frozenset({EOS}))
    for _ in range(params.max_tokens):
        steps = [model(beam.tokens) for beam in beams.running]
        beams.advance([dict(itertools.islice(step.items(), 2 * params.beam_width)) for step in steps])
        if not beams.running or (stop_early and beams.is_done):
            break
    return [(beam.tokens, round(beam.score(params.length_penalty), 9)) for beam in beams.best()]


def everything(model, max_tokens, length_penalty, n):
    """All continuations there are, by score."""
    found: list[tuple[tuple[int, ...], float]] = []
    open_ones: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(max_tokens):
        grown: list[tuple[tuple[int, ...], float]] = []
        for tokens, total in open_ones:
            for token, entry in model(tokens).items():
                longer = (*tokens, token), total + entry.logprob
                (found if token == EOS else grown).append(longer)
        open_ones = grown
    scored = [
        (tokens, round(score(total, len(tokens) - (tokens[-1] == EOS), length_penalty), 9))
        for tokens, total in (*found, *open_ones)
    ]
    return sorted(scored, key=lambda entry: -entry[1])[:n]


@given(seed=st.integers(0, 1000), length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), n=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_wide_enough_it_finds_the_best_there_are(seed, length_penalty, n):
    # Three tokens that go on, twice: nine beams hold everything.
    model = toy_model(seed)
    found = search(model, beam_width=9, max_tokens=3, n=n, length_penalty=length_penalty)
    assert [value for _, value in found] == [value for _, value in everything(model, 3, length_penalty, n)]


@given(
    seed=st.integers(0, 1000),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
    width=st.integers(1, 4),
    max_tokens=st.integers(1, 8),
)
@settings(deadline=None, max_examples=60)
def test_stopping_early_changes_nothing(seed, length_penalty, width, max_tokens):
    options = {"beam_width": width, "max_tokens": max_tokens, "n": width, "length_penalty": length_penalty}
    assert search(toy_model(seed), **options) == search(toy_model(seed), stop_early=False, **options)


def test_one_beam_is_greedy():
    model = toy_model(5)
    tokens: tuple[int, ...] = ()
    while len(tokens) < 6:
        tokens = (*tokens, next(token for token in model(tokens) if token != EOS))
    # So large a penalty that no early end can win.
    ((found, _),) = search(model, beam_width=1, max_tokens=6, length_penalty=10.0)
    assert found == tokens


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beam_width": MAX_BEAM_WIDTH + 1}, r"beam_width=11 must be in \[1, 10\]"),
        ({"n": 3}, r"n=3 must be in \[1, 2\], the width of the beam"),
        ({"length_penalty": 11.0}, "length_penalty=11.0 must be in"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    ],
)
def test_bad_params(options, said):
    with pytest.raises(ValueError, match=said):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **options})


async def post(client, path="/v1/completions", **body):
    response = await client.post(path, json=body | {"use_beam_search": True})
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_most_probable_continuations(client):
    """The next byte has logit 10, the one after it 5: a beam that skips once loses 5, wherever it does."""
    answer = await post(client, prompt="abc", max_tokens=3, n=3, logprobs=1)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[0] == "def" and set(texts[1:]) < {"efg", "dfg", "deg"}
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 9 and answer["usage"]["prompt_tokens"] == 3
    (first, second) = (sum(choice["logprobs"]["token_logprobs"]) for choice in answer["choices"][:2])
    assert first - second == pytest.approx(5.0, abs=1e-4)
    assert all(len(top) == 1 for top in answer["choices"][0]["logprobs"]["top_logprobs"])


async def test_a_beam_may_be_wider_than_the_answer(client):
    answer = await post(client, prompt="abc", max_tokens=2, best_of=3)
    assert [choice["text"] for choice in answer["choices"]] == ["de"]


async def test_chat_and_metrics(client, service):
    messages = [{"role": "user", "content": "hi"}]
    answer = await post(
        client, "/v1/chat/completions", messages=messages, max_tokens=2, n=2, length_penalty=0.0, include_metrics=True
    )
    assert len(answer["choices"]) == 2
    # One step asks for the first token, one for two beams' second.
    assert answer["metrics"]["graph_steps"]["exact"] in (2, 3)
    # The engine's requests are no requests of clients.
    assert b'xllm_request_finished_total{reason="length"} 0.0' in service.metrics.render()


async def test_every_step_has_the_place_of_its_request(client, engine, monkeypatch):
    asked = []
    generate = engine.generate

    def recorded(request_id, prompt, params):
        asked.append((params.priority, params.offline))
        return generate(request_id, prompt, params)

    monkeypatch.setattr(engine, "generate", recorded)
    await post(client, prompt="abc", max_tokens=2, n=2, priority=7)
    assert set(asked) == {(7, False)} and len(asked) == 3
    asked.clear()
    await client.post("/v1/embeddings", json={"input": "abc", "priority": "offline"})
    assert asked == [(0, True)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream": True}, "stream"),
        ({"stop": ["x"]}, "stop"),
        ({"temperature": 0.7}, "temperature"),
        ({"echo": True}, "echo"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"n": 11}, "n"),
        ({"best_of": 11}, "best_of"),
        ({"n": 2, "length_penalty": 20}, "length_penalty"),
        ({"length_penalty": 2, "use_beam_search": False}, "length_penalty"),
    ],
)
async def test_what_does_not_go_with_it(client, body, param):
    response = await client.post("/v1/completions", json={"prompt": "abc", "use_beam_search": True} | body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
