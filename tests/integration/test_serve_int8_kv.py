"""xllm-serve on an artifact with an int8 KV cache: what it says, what it refuses, and KV from process to process."""

import grpc
import pytest

from tests.integration.serve_process import ServeProcess, run_refused
from tests.integration.test_serve_hand_over import (
    NUM_TOKENS,
    PROMPT,
    hand_over,
    peer,
    request_of,
    reserve,
    resume,
    tokens_of,
)

pytestmark = pytest.mark.integration


def test_the_dtype_is_said_and_a_mismatch_refused(int8_kv_artifact, family_artifact):
    with ServeProcess(int8_kv_artifact, "--kv-cache-dtype", "int8", "--kv-memory", "64MiB") as process:
        assert any("KV cache token-major 3x2x2x24 int8 every 336 bytes" in line for line in process.log)
    plain = family_artifact("qwen3")
    message = run_refused(plain, "--kv-cache-dtype", "int8")
    assert "a KV cache in float32" in message and "compile it with --kv-cache-dtype int8" in message


def test_kv_goes_from_prefill_to_decode_in_int8_only(int8_kv_artifact, family_artifact):
    secret = ("--transfer", "tcp", "--transfer-secret", "hush")
    with (
        peer(int8_kv_artifact, "prefill", *secret) as p,
        peer(int8_kv_artifact, "decode", *secret) as d,
        peer(family_artifact("qwen3"), "decode", *secret) as plain,
    ):
        (alone,) = p.inference.Generate(request_of(final_only=True))
        reservation = reserve(d)
        *first, last = hand_over(p, reservation)
        assert last.num_kv_tokens == len(PROMPT)
        tokens = tokens_of([*first, last])
        rest = tokens_of(resume(d, reservation, tokens, last.num_kv_tokens))
        assert tokens + rest == list(alone.choices[0].token_ids) and rest
        assert len(tokens + rest) == NUM_TOKENS
        assert p.process.metrics()["xllm_kv_sent_bytes_total"] == len(PROMPT) * 336
        # The weights are the same, the rows are not.
        assert plain.info.weights_key == p.info.weights_key
        with pytest.raises(grpc.RpcError, match=r"kv_layout='token-major 3x2x2x24 int8 every 336 bytes' does not fit"):
            reserve(plain, kv_layout=p.info.kv_layout)
