"""Serves many instances: gateway, registry, routing, roles."""

if __name__ == "scheduler":
    raise ImportError("import this package as xllm_compile.scheduler")
