"""Servers that are started, asked at rates of their own, and compared."""

import json
import sys

import pytest

from xllm_compile.benchmarks.bench_serving_rate import OURS, Contender, Found, RateSetting, _bars, run_serving_rate
from xllm_compile.benchmarks.workloads import mixed_requests

SETTING = RateSetting(rounds=1, max_tries=2, seconds=1.0, slo_ttft_s=30.0, slo_tpot_s=10.0, vocab_size=100, seed=5)


def test_a_contender_is_a_name_a_model_and_a_command():
    assert Contender.parse("llama=llama-server --port {port} -c 4096") == Contender(
        name="llama", command=("llama-server", "--port", "{port}", "-c", "4096")
    )
    assert Contender.parse("vllm@m=serve m --port={port}").model == "m"
    for text in ("llama-server --port {port}", "=serve {port}", "llama=llama-server"):
        with pytest.raises(ValueError, match="NAME=COMMAND"):
            Contender.parse(text)


def test_a_rate_changes_the_pace_of_the_same_requests():
    slow, fast = mixed_requests(200, rate=1.0, seed=3), mixed_requests(300, rate=4.0, seed=3)
    assert [(one.prompt_tokens, one.output_tokens) for one in slow] == [
        (one.prompt_tokens, one.output_tokens) for one in fast[:200]
    ]
    assert [one.arrival_s for one in slow] == pytest.approx([4 * one.arrival_s for one in fast[:200]])
    assert slow[-1].arrival_s == pytest.approx(199, rel=0.2)
    assert {one.arrival_s for one in mixed_requests(5, rate=None, seed=3)} == {0.0}


def test_the_first_is_compared_with_the_best_of_the_others():
    rates = {OURS: 3.0, "slow": 1.0, "quick": 2.0}
    found = {name: Found(points=[{rate: 0.95, 9.0: 0.0}]) for name, rate in rates.items()}
    assert _bars(found)[-1].value == pytest.approx(1.5)
    assert len(_bars({OURS: found[OURS]})) == 1


@pytest.mark.parametrize("points", [{2.0: 1.0}, {2.0: 0.0}, {2.0: 0.5, 3.0: 0.1}])
def test_a_limit_that_was_not_found_is_not_compared(points):
    known, guessed = Found(points=[{3.0: 0.95, 9.0: 0.0}]), Found(points=[points])
    for found in ({OURS: known, "other": guessed}, {OURS: guessed, "other": known}):
        assert [bar.what for bar in _bars(found)] == [f"{OURS}, sustained", "other, sustained"]


def test_a_contender_that_ends_says_its_last_words(tmp_path):
    failing = Contender(name="bad", command=(sys.executable, "-c", "raise SystemExit('no model at {port}')"))
    with pytest.raises(RuntimeError, match=r"(?s)bad ended with code 1:.*no model at \d+"):
        run_serving_rate([failing], SETTING, tmp_path, ["bench"], name="rate")
    missing = Contender(name="none", command=("no-such-command", "{port}"))
    with pytest.raises(RuntimeError, match="none cannot be started"):
        run_serving_rate([missing], SETTING, tmp_path, ["bench"], name="rate")
    assert list(tmp_path.iterdir()) == []


# Whatever is asked of it: two tokens.
CURT = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Curt(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.do_GET()
        events = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}], "usage": {"completion_tokens": 2}}]
        for event in [*map(json.dumps, events), "[DONE]"]:
            self.wfile.write(f"data: {event}\\n\\n".encode())

class Server(ThreadingHTTPServer):
    request_queue_size = 128

Server(("127.0.0.1", int(sys.argv[1])), Curt).serve_forever()
"""


def test_a_server_that_ends_early_is_not_compared(tmp_path):
    curt = Contender(name="curt", command=(sys.executable, "-c", CURT, "{port}"))
    with pytest.raises(RuntimeError, match=r"curt sent 2 tokens where \d+ were asked for"):
        run_serving_rate([curt], SETTING, tmp_path, ["bench"], name="rate")


@pytest.mark.integration
def test_a_server_that_has_all_the_time_it_wants_sustains_every_rate(family_artifact, tmp_path):
    artifact = family_artifact("qwen3")
    run_serving_rate([Contender.ours(artifact, 10.0)], SETTING, tmp_path, ["bench"], name="rate")
    record = json.loads((tmp_path / "rate.json").read_text())
    found = record["raw"]["found"][OURS]
    (points,) = found["points"]
    # The rate lies beyond all that were tried: twice as many as were asked for.
    assert list(points.values()) == [1.0, 1.0, 1.0, 1.0]
    assert found["rates"] == [max(map(float, points))]
    assert (tmp_path / "rate.html").read_text().count("<svg") == 1
