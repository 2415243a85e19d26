"""Bytes and operations of a step, against figures worked out by hand."""

from dataclasses import replace

import pytest

from xllm_compile.benchmarks.bench_latency import shares
from xllm_compile.benchmarks.checkpoints import QWEN3_0_6B
from xllm_compile.benchmarks.limits import Limits
from xllm_compile.benchmarks.roofline import linear_parameters, prefill_flops
from xllm_compile.models.registry import read_model_config

CONFIG = read_model_config(QWEN3_0_6B.hf_config())
LIMITS = Limits(
    num_threads=2,
    read_gb_per_s=40,
    bf16_gemm_gflops=400,
    f32_gemm_gflops=200,
    bf16_packed_32_gflops=420,
    bf16_register_gflops=460,
    f32_register_gflops=230,
)


def test_linears_of_the_real_shape():
    per_layer = 1024 * (16 + 8 + 8) * 128 + 16 * 128 * 1024 + 3 * 1024 * 3072
    assert linear_parameters(CONFIG) == 28 * per_layer == 440_401_920


def test_a_prompt_of_one_token_is_one_pass_over_the_weights():
    attention = 28 * 4 * 16 * 128
    assert prefill_flops(CONFIG, 1) == 2 * (440_401_920 + 151936 * 1024) + attention


def test_attention_grows_with_the_square():
    linear = 2 * 440_401_920
    head = 2 * 151936 * 1024
    assert prefill_flops(CONFIG, 512) - 512 * linear - head == 28 * 4 * 16 * 128 * 512 * 513 // 2


def test_a_share_is_of_the_mean_of_the_limits_around_it():
    faster = replace(LIMITS, read_gb_per_s=60)
    assert shares([25.0], [(LIMITS, faster)], 1e9, "read_gb_per_s") == pytest.approx([0.5])
