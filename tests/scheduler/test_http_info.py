from tests.scheduler.service_fixtures import MAX_MODEL_LEN


async def test_models(client):
    answer = (await client.get("/v1/models")).json()
    assert answer["object"] == "list"
    assert [card["id"] for card in answer["data"]] == ["counter", "alias"]
    card = (await client.get("/v1/models/alias")).json()
    assert (card["id"], card["root"], card["max_model_len"]) == ("alias", "counter", MAX_MODEL_LEN)


async def test_health_and_version(client):
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/version")).json() == {"version": "1.2.3"}


async def test_tokenize_text_and_messages(client):
    answer = (await client.post("/tokenize", json={"prompt": "ab", "return_token_strs": True})).json()
    assert answer == {"count": 2, "max_model_len": MAX_MODEL_LEN, "tokens": [97, 98], "token_strs": ["a", "b"]}
    answer = (await client.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]})).json()
    assert bytes(answer["tokens"]).decode() == "<user>x<assistant>"
    for body in ({}, {"prompt": "a", "messages": []}):
        assert (await client.post("/tokenize", json=body)).status_code == 400


async def test_detokenize(client):
    assert (await client.post("/detokenize", json={"tokens": [104, 105, 256]})).json() == {"prompt": "hi<eos>"}
    assert (await client.post("/detokenize", json={"tokens": [-1]})).status_code == 400


async def test_metrics_say_which_targets_were_kept(client):
    for fields in ({"ttft_slo_ms": 1e6, "tpot_slo_ms": 1e-6}, {"ttft_slo_ms": 1e-6, "offline": True}, {}):
        await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5} | fields)
    text = (await client.get("/metrics")).text
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    expected = {
        'xllm_slo_requests_total{outcome="met",target="ttft"}': 1,
        'xllm_slo_requests_total{outcome="missed",target="ttft"}': 1,
        'xllm_slo_requests_total{outcome="met",target="tpot"}': 0,
        'xllm_slo_requests_total{outcome="missed",target="tpot"}': 1,
        'xllm_sequences{class="offline",state="waiting"}': 0,
        'xllm_class_preemptions_total{class="offline"}': 0,
    }
    assert {name: float(samples[name]) for name in expected} == expected


async def test_metrics_count_what_happened(client):
    await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5})
    await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "n": 0})
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    expected = {
        "xllm_time_to_first_token_seconds_count": 1,
        "xllm_time_per_output_token_seconds_count": 1,
        "xllm_e2e_request_latency_seconds_count": 1,
        "xllm_prompt_tokens_total": 3,
        "xllm_generation_tokens_total": 5,
        "xllm_preemptions_total": 0,
        "xllm_num_requests_running": 0,
        "xllm_num_requests_waiting": 0,
        "xllm_kv_cache_tokens_used": 0,
        'xllm_request_finished_total{reason="length"}': 1,
        'xllm_requests_total{api="http",outcome="ok"}': 1,
        'xllm_requests_total{api="http",outcome="refused"}': 1,
        'xllm_graph_cache_steps_total{outcome="exact",part="layers",reason="bucket"}': 5,
    }
    assert {name: float(samples[name]) for name in expected} == expected
