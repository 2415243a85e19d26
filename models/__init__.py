"""Model definitions written for capture, weight mapping and the demo models."""

if __name__ == "models":
    raise ImportError("import this package as xllm_compile.models")
