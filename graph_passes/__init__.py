"""Graph passes: FX graph to FX graph, the cost model and the verifier."""

if __name__ == "graph_passes":
    raise ImportError("import this package as xllm_compile.graph_passes")
