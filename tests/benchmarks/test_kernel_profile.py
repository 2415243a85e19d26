"""The profiler's generated source follows the operators' schemas."""

import pytest

from xllm_compile.benchmarks.bench_profile import ProfiledStep, _table
from xllm_compile.benchmarks.kernel_profile import KernelCall, _source, _wrapper, parse_schema
from xllm_compile.runtime.ops import SCHEMAS
from xllm_compile.targets.cpu import shim_declarations


def call(op: str, begin: float, end: float, *, out_features: int = 0, weight_bytes: int = 0) -> KernelCall:
    return KernelCall(
        op=op, rows=1, columns=64, out_features=out_features, weight_bytes=weight_bytes, begin_s=begin, end_s=end
    )


def test_a_schema_in_parts():
    schema = "(Tensor x, Tensor? bias, Tensor(a!) cache, int n, float eps, bool f32) -> (Tensor, Tensor)"
    kinds = [("Tensor", "x"), ("Tensor?", "bias"), ("Tensor", "cache"), ("int", "n"), ("float", "eps"), ("bool", "f32")]
    assert parse_schema(schema) == (kinds, 2)
    assert parse_schema("(Tensor x) -> ()") == ([("Tensor", "x")], 0)


def test_every_operator_is_wrapped_with_the_signature_the_graphs_call():
    source = _source()
    for name in SCHEMAS:
        assert f"int32_t aoti_torch_cpu_{name}(" in source
    for (declaration,) in shim_declarations().values():
        name = declaration.split("(")[0].split()[-1]
        num_parameters = declaration.count(",") + 1
        wrapper = next(line for line in source.splitlines() if f"int32_t {name}(" in line)
        assert wrapper.count(",") + 1 == num_parameters


def test_a_linear_reads_its_weight_with_scales_and_zero_points():
    wrapper = _wrapper(0, "int4_zero_linear")
    assert "open_event(0, x, out_features, bytes_of(weight) + bytes_of(scale) + bytes_of(zero))" in wrapper
    assert "open_event(0, x, 0, 0)" in _wrapper(0, "rms_norm")


def test_a_step_is_kernels_and_what_lies_between_and_around_them():
    calls = [call("rms_norm", 1.0, 1.1), call("int8_linear", 1.2, 1.6, out_features=128, weight_bytes=800_000_000)]
    step = ProfiledStep(begin_s=0.9, end_s=2.0, execute_begin_s=1.0, execute_end_s=1.8, calls=calls)
    assert step.kernels_s == pytest.approx(0.5)
    assert step.between_s == pytest.approx(0.3)
    assert step.host_s == pytest.approx(0.3)
    rows, parts = _table([step, step])
    assert parts["step"] == pytest.approx(1100)
    assert parts["by_kernel"]["int8_linear 64 -> 128"] == {"ms": pytest.approx(400), "calls": 1}
    assert rows[-1] == ("int8_linear 64 -> 128", "400.000", "1", "400000.0", "2.0", "0")
