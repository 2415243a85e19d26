"""Measurements: xllm-bench and the recorded results."""

if __name__ == "benchmarks":
    raise ImportError("import this package as xllm_compile.benchmarks")
