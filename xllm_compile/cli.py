"""xllm-compile: a Hugging Face model directory in, an artifact out."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from xllm_compile.build_config import BuildConfig

from xllm_compile import __version__
from xllm_compile.graph_passes.quantisation import SCHEMES, Quantisation
from xllm_compile.models.config import DTYPES


def parse_buckets(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no comma-separated list of token counts, such as 1,4,16,512") from None


def read_quantisation(scheme: str, group_size: int | None, has_head: bool) -> Quantisation | None:
    """From the command line's options. Raises ValueError when one of them has nothing to act on."""
    if scheme == "none" and group_size is not None:
        raise ValueError("--quantize-group needs --quantize int4 or int4-dynamic")
    if scheme == "none" and not has_head:
        return None
    return Quantisation(scheme=scheme, group_size=group_size, has_head=has_head)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100})
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Artifact to write.  [default: MODEL_DIR.xllm]")
@click.option("--target", default="cpu", help="cpu, or npu (compiles where torch_npu is; not served yet).")
@click.option("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", help="auto is the checkpoint's own.")
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "int8"]),
    default="auto",
    help="int8 halves what a bfloat16 KV cache takes; auto is the model's own dtype.",
)
@click.option("--max-model-len", type=int, help="Longest prompt plus output, in tokens.  [default: the model's limit]")
@click.option(
    "--max-num-batched-tokens", type=int, default=512, help="Most tokens in one step; also the prefill chunk."
)
@click.option("--buckets", callback=parse_buckets, help="Step sizes with a graph of their own, such as 1,2,4,8,512.")
@click.option(
    "--workload", type=click.Path(path_type=Path), help="Choose buckets for this trace: .csv, .jsonl or a folder."
)
@click.option(
    "--device-spec",
    type=click.Path(path_type=Path),
    help="Predict with this spec: a .json or a known device.",
)
@click.option("--tensor-parallel-size", type=int, default=1, help="Processes that share each layer.")
@click.option("--jobs", "-j", type=int, help="Graphs compiled side by side.  [default: one per CPU]")
@click.option(
    "--graph-mode",
    type=click.Choice(["full", "partial", "eager"]),
    default="full",
    help="partial: attention outside the graphs; eager: no graphs.",
)
@click.option(
    "--quantize",
    type=click.Choice(["none", *SCHEMES]),
    default="none",
    help="Round the layers' weights; with -dynamic activations, too: w8a8, w4a8.",
)
@click.option("--quantize-group", type=int, help="int4: weights that share a scale, 32 or 128.  [default: 32]")
@click.option(
    "--quantize-head",
    is_flag=True,
    help="Round the head's weight to int8, too, and an embedding that shares it; also of a quantised checkpoint.",
)
@click.option("--disable-pass", "disabled", multiple=True, metavar="NAME", help="Leave a pass out; may be repeated.")
@click.option(
    "--explain", is_flag=True, help="Show what each pass does to this model, or why it is not run; compile nothing."
)
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.version_option(__version__, prog_name="xllm-compile")
def command(
    model_dir: Path,
    output: Path | None,
    target: str,
    dtype: str,
    kv_cache_dtype: str,
    max_model_len: int | None,
    max_num_batched_tokens: int,
    buckets: tuple[int, ...] | None,
    workload: Path | None,
    device_spec: Path | None,
    tensor_parallel_size: int,
    jobs: int | None,
    graph_mode: str,
    quantize: str,
    quantize_group: int | None,
    quantize_head: bool,
    disabled: tuple[str, ...],
    explain: bool,
    quiet: bool,
) -> None:
    """Compile MODEL_DIR (config.json, *.safetensors, tokenizer.json) ahead of time into an artifact.

    A second run with nothing changed does nothing; with something changed it compiles only the graphs that differ.
    Serve the result with xllm-serve, or run it in the terminal with xllm-generate.
    """
    from xllm_compile.build_config import BuildConfig

    config = BuildConfig(
        model_dir=model_dir,
        output=output or default_output(model_dir),
        target=target,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        buckets=buckets,
        workload=workload,
        device_spec=device_spec,
        tensor_parallel_size=tensor_parallel_size,
        jobs=jobs,
        graph_mode=graph_mode,
        disabled_passes=frozenset(disabled),
        quantisation=read_quantisation(quantize, quantize_group, quantize_head),
    )
    if explain:
        from xllm_compile.explain import explain_passes

        explain_passes(config)
    else:
        run_build(config, is_quiet=quiet)


def main() -> NoReturn:
    """Entry point: a user's mistake is one line and exit code 2."""
    # torch imports torch_npu by itself where it is installed, and fails to load where CANN is not.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        # --help and --version give 0, a build None.
        sys.exit(command.main(standalone_mode=False) or 0)
    except (click.Abort, KeyboardInterrupt):
        click.echo("xllm-compile: interrupted; nothing was written", err=True)
        sys.exit(130)
    except (click.ClickException, ValueError, OSError, RuntimeError) as err:
        click.echo(f"xllm-compile: error: {error_line(err)}", err=True)
        sys.exit(2)


def run_build(config: "BuildConfig", *, is_quiet: bool = False) -> None:
    """Build with a progress bar and a one-line summary on stderr."""
    from xllm_compile.build import build
    from xllm_compile.progress import NoProgress, TerminalProgress

    if is_quiet:
        build(config, NoProgress())
        return
    with TerminalProgress() as progress:
        result = build(config, progress)
    for note in result.notes:
        click.echo(f"xllm-compile: {note}", err=True)
    if result.is_up_to_date:
        click.echo(f"{result.output} is up to date ({result.seconds:.1f} s)", err=True)
    else:
        reused = result.num_graphs - result.num_compiled
        click.echo(
            f"{result.output}: {result.num_compiled} graphs compiled, {reused} reused, {result.seconds:.1f} s", err=True
        )


def default_output(model_dir: Path) -> Path:
    resolved = model_dir.resolve()
    return resolved.with_name(resolved.name + ".xllm")


def error_line(err: BaseException) -> str:
    """One line for the user, with the next step where the error does not name one itself."""
    import errno

    if isinstance(err, OSError) and err.errno == errno.ENOSPC:
        return f"disk full while writing {err.filename or 'the artifact'}; free some space or choose another -o"
    if isinstance(err, OSError) and err.filename:
        return f"{err.filename}: {err.strerror}; check the path and its permissions"
    if isinstance(err, click.ClickException):
        return " ".join(err.format_message().split()) + "; see --help"
    return " ".join(str(err).split()) or type(err).__name__


if __name__ == "__main__":
    main()
