"""Which sizes of a step get graphs of their own, and what steps are predicted to take."""

from collections.abc import Mapping, Sequence

from xllm_compile.build_config import MAX_BUCKETS_BY_DEFAULT, BuildConfig
from xllm_compile.graph_passes.buckets import choose_buckets, default_histogram, workload_histogram
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.node_cost import step_seconds
from xllm_compile.graph_passes.region import RegionGraph
from xllm_compile.graph_passes.step_cost import StepTimes, tabulate
from xllm_compile.graph_passes.step_replay import replay_steps
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.report import BucketReport
from xllm_compile.request_trace import TraceRequest, has_times, read_trace
from xllm_compile.targets import lowering_for

# Sequences that a server runs side by side unless told otherwise.
MAX_NUM_SEQS = 64
# Rows of logits beyond the buckets of the head: the table goes on to any batch a step can hold.
_MAX_LOGITS_ROWS = 256


def predict_step_times(
    regions: Sequence[tuple[RegionGraph, int]], model: CostModel, max_num_batched_tokens: int
) -> dict[str, StepTimes]:
    """By axis: "T" for the regions run on every token, "R" for the head; regions come with how often a step runs them.

    Attention over what is already cached is left out (see step_cost).
    """
    by_tokens = [entry for entry in regions if entry[0].name != "head"]
    by_rows = [entry for entry in regions if entry[0].name == "head"]
    overhead = model.spec.dynamic_overhead
    return {
        "T": tabulate(
            lambda size: step_seconds(by_tokens, StepShape(padded_tokens=size), model), max_num_batched_tokens, overhead
        ),
        "R": tabulate(
            lambda size: (
                step_seconds(by_rows, StepShape(padded_tokens=size, padded_logits=size), model)
                - model.spec.step_overhead_s
            ),
            min(max_num_batched_tokens, _MAX_LOGITS_ROWS),
            overhead,
        ),
    }


def seconds_per_key(regions: Sequence[tuple[RegionGraph, int]], model: CostModel) -> float:
    """What each cached token adds to a step that decodes."""
    context = 4096
    with_keys = StepShape(sequences=((1, context),), padded_tokens=1)
    return (
        step_seconds(regions, with_keys, model) - step_seconds(regions, StepShape(padded_tokens=1), model)
    ) / context


def read_workload(config: BuildConfig) -> list[TraceRequest]:
    """The requests to choose buckets for; empty where nothing is chosen for any. Raises TraceError for a bad one."""
    return read_trace(config.workload) if config.workload is not None and config.buckets is None else []


def step_histogram(
    requests: Sequence[TraceRequest], max_num_batched_tokens: int, times: StepTimes, key_s: float
) -> dict[int, float]:
    """How often steps of each size are expected: from the requests or, without any, the default.

    Requests with arrival times are replayed on the predicted times; ``key_s`` is seconds_per_key.
    """
    if not requests:
        return default_histogram(max_num_batched_tokens)
    if not has_times(requests):
        lengths = [(request.prompt_tokens, request.output_tokens) for request in requests]
        return workload_histogram(lengths, max_num_batched_tokens)
    start = requests[0].arrival_s or 0.0
    return replay_steps(
        [((r.arrival_s or 0.0) - start, r.prompt_tokens, r.output_tokens) for r in requests],
        lambda tokens, keys: times.of(tokens) + keys * key_s,
        max_tokens=max_num_batched_tokens,
        max_seqs=min(MAX_NUM_SEQS, max_num_batched_tokens),
    )


def pick_buckets(config: BuildConfig, histogram: Mapping[int, float], times: StepTimes) -> BucketReport:
    """Those given, or those that suit the histogram; ``times`` are those of the token axis."""
    if config.buckets is not None:
        tokens, reason = tuple(sorted({*config.buckets})), "given"
    else:
        tokens = _choose_tokens(histogram, config.max_num_batched_tokens, times)
        reason = f"chosen for {config.workload.name if config.workload is not None else 'the default workload'}"
    return BucketReport(
        tokens=tokens, logits=lowering_for(config.target).logits_buckets(tokens), reason=reason, histogram=histogram
    )


def _choose_tokens(histogram: Mapping[int, float], max_num_batched_tokens: int, times: StepTimes) -> tuple[int, ...]:
    # A sequence that decodes alone is never padded: kernels have ways of their own for one row, of which the prediction
    # knows nothing. In cache, weights in int4 are read at 63 GB/s a core for one row and at 18 for three.
    alone = (1,) if histogram.get(1, 0.0) > 0 and max_num_batched_tokens > 1 else ()
    others = {size: weight for size, weight in histogram.items() if size not in alone}
    return (*alone, *choose_buckets(others, max_num_batched_tokens, MAX_BUCKETS_BY_DEFAULT - len(alone), times))
