"""Who is compared with whom: every engine at one precision, each with the settings that suit it best."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xllm_compile.benchmarks.artifacts import artifact_of_shape
from xllm_compile.benchmarks.bench_latency import Case
from xllm_compile.benchmarks.bench_precisions import DECODE, LONG, LONG_PREFILL, PREFILL, WIDE
from xllm_compile.benchmarks.checkpoints import Shape, checkpoint
from xllm_compile.benchmarks.console import say
from xllm_compile.benchmarks.peer_models import LLAMA, OPENVINO, VLLM, Peers, gguf_file, openvino_model
from xllm_compile.runtime.artifact import Manifest

OURS = "xllm-compile"
# By precision: schemes of --quantize. Peers, too, round activations to int8 where weights are quantised.
SCHEMES = {"bfloat16": ("none",), "int8": ("int8", "int8-dynamic"), "int4": ("int4", "int4-dynamic")}
KV_GIB = 2
MEDIUM = Case(name="decode batch 8, context 128", num_seqs=8, prompt_tokens=128, num_tokens=24)
CASES = (PREFILL, LONG_PREFILL, DECODE, LONG, MEDIUM, WIDE)
OFFLINE = "offline, mixed lengths"
# A call of LONG is one of LONG_PREFILL too.
RUN = (DECODE, LONG, MEDIUM, WIDE, PREFILL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """One engine with one setting, as a process of its own."""

    engine: str
    setting: str = ""
    """What is other than the engine's own choice."""
    module: str
    arguments: Sequence[str]
    python: Path | None = None
    cases: tuple[Case, ...] = RUN
    """A setting that only one case has use for takes part in that one."""

    @property
    def name(self) -> str:
        return f"{self.engine}, {self.setting}" if self.setting else self.engine

    @property
    def is_whole(self) -> bool:
        """Whether it also runs the mixed workload, and its memory counts."""
        return self.cases == RUN

    @property
    def calls(self) -> set[str]:
        """Names of what it runs."""
        return {case.name for case in self.cases} | ({OFFLINE} if self.is_whole else set())


def contestants(shape: Shape, precision: str, peers: Peers, work_dir: Path, *, seed: int) -> list[Contestant]:
    """All that take part at this precision; their models are made now unless they are there."""
    model_dir = checkpoint(shape, work_dir, seed=seed)
    found = []
    for quantize in SCHEMES[precision]:
        say(f"building {shape.name}, {quantize}")
        artifact, manifest = artifact_of_shape(shape, work_dir, seed=seed, quantize=quantize)
        found.append(_ours(artifact, quantize if quantize.endswith("-dynamic") else ""))
    if OPENVINO in peers.pythons:
        python = peers.pythons[OPENVINO]
        exported = openvino_model(python, model_dir, precision, work_dir)
        found.append(_openvino(python, exported))
        if precision == "bfloat16":
            found += [_openvino(python, exported, kv_precision) for kv_precision in ("bf16", "u8")]
    if LLAMA in peers.pythons:
        python, kv_tokens = peers.pythons[LLAMA], (KV_GIB << 30) // _kv_bytes_per_token(manifest)
        file = gguf_file(python, model_dir, precision, work_dir)
        found.append(_llama(python, file, kv_tokens))
        if precision == "bfloat16":
            found.append(_llama(python, file, kv_tokens, has_flash_attention=False))
    if VLLM in peers.pythons and precision == "bfloat16":
        given = [str(model_dir), "--kv-gib", str(KV_GIB)]
        found.append(Contestant(engine=VLLM, module="engine_vllm", arguments=given, python=peers.pythons[VLLM]))
    return found


def _kv_bytes_per_token(manifest: Manifest) -> int:
    return int(manifest.memory_plan["kv_bytes_per_token"])


def _ours(artifact: Path, setting: str) -> Contestant:
    given = [str(artifact), "--max-num-seqs", "64", "--kv-memory-bytes", str(KV_GIB << 30)]
    return Contestant(engine=OURS, setting=setting, module="engine_xllm", arguments=given)


def _openvino(python: Path, model: Path, kv_precision: str = "") -> Contestant:
    """kv_precision: "" is OpenVINO's choice, float16 beside bfloat16 weights and u8 beside quantised ones."""
    if not kv_precision:
        given = [str(model), "--kv-gib", str(KV_GIB)]
        return Contestant(engine=OPENVINO, module="engine_openvino", arguments=given, python=python)
    return Contestant(
        engine=OPENVINO,
        setting=f"KV {kv_precision}",
        module="engine_openvino",
        arguments=[str(model), "--kv-gib", "1", "--kv-precision", kv_precision],
        python=python,
        cases=(LONG,),
    )


def _llama(python: Path, file: Path, kv_tokens: int, *, has_flash_attention: bool = True) -> Contestant:
    given = [str(file), "--kv-tokens", str(kv_tokens)]
    if has_flash_attention:
        return Contestant(engine=LLAMA, module="engine_llama", arguments=given, python=python)
    return Contestant(
        engine=LLAMA,
        setting="no flash attention",
        module="engine_llama",
        arguments=[*given, "--flash-attention", "off"],
        python=python,
        cases=(LONG,),
    )
