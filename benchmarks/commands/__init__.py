"""The subcommands of xllm-bench by subject: their options; what they do is in benchmarks/bench_*.py."""
