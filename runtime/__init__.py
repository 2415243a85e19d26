"""Serves one artifact on one instance."""

if __name__ == "runtime":
    raise ImportError("import this package as xllm_compile.runtime")
