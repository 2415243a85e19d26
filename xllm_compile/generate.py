"""xllm-generate: completion and chat in the terminal, offline, streamed."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xllm_compile import __version__
from xllm_compile.cli import error_line
from xllm_compile.runtime.lean_torch import defer_parts
from xllm_compile.scheduler.speculative_options import speculative_options

if TYPE_CHECKING:
    from xllm_compile.llm import LLM
    from xllm_compile.runtime.outputs import RequestOutput
    from xllm_compile.runtime.sampling_params import SamplingParams


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100})
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="Text to complete, or the chat message.  [default: standard input]")
@click.option("--chat", is_flag=True, help="Wrap the prompt in the chat template; without --prompt, a conversation.")
@click.option("--system", help="System message of the chat.")
@click.option("-n", "--max-tokens", type=int, default=256, help="Most tokens to generate.")
@click.option("-t", "--temperature", type=float, help="0 is greedy.  [default: the model's, else 1.0]")
@click.option("--top-p", type=float, help="[default: the model's, else 1.0]")
@click.option("--top-k", type=int, help="[default: the model's, else all]")
@click.option("--seed", type=int, help="Same seed, same text.")
@click.option("--stop", multiple=True, help="End at this text; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-sequence token.")
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto")
@click.option("--max-model-len", type=int, help="Longest prompt plus output.  [default: the model's limit]")
@click.option("--enforce-eager", is_flag=True, help="Run operator by operator, without the compiled graphs.")
@speculative_options
@click.option("--stats", is_flag=True, help="Print times, rates and graph-cache hits to stderr at the end.")
@click.version_option(__version__, prog_name="xllm-generate")
def main(
    model: Path,
    prompt: str | None,
    chat: bool,
    system: str | None,
    dtype: str,
    max_model_len: int | None,
    enforce_eager: bool,
    speculative: str | None,
    draft_model: Path | None,
    num_speculative_tokens: int,
    stats: bool,
    **sampling: Any,
) -> None:
    """Generate text with MODEL: an artifact, or a model directory that is compiled on first use."""
    began = time.monotonic()
    try:
        defer_parts()
        from xllm_compile.llm import LLM

        if prompt is None and not chat:
            prompt = sys.stdin.read()
        llm = LLM(
            model,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=1,
            enforce_eager=enforce_eager,
            speculative=speculative,
            draft_model=draft_model,
            num_speculative_tokens=num_speculative_tokens,
        )
        opened_s = time.monotonic() - began
        params = sampling_params(llm, sampling)
        if chat and prompt is None:
            converse(llm, params, system=system, stats=stats, opened_s=opened_s)
            return
        text = chat_prompt(llm, [_message("user", prompt or "")], system) if chat else prompt or ""
        if not chat:
            click.echo(text, nl=False)
        _, final = stream(llm, text, params)
        click.echo()
        if stats:
            print_stats(llm, final, opened_s)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as err:
        click.echo(f"xllm-generate: error: {error_line(err)}", err=True)
        sys.exit(2)


def sampling_params(llm: "LLM", given: dict[str, Any]) -> "SamplingParams":
    """The model's generation defaults, overridden by what was given. Streams deltas."""
    from xllm_compile.runtime.sampling_params import RequestOutputKind

    overrides = {name: value for name, value in given.items() if value is not None}
    return llm.get_tokenizer().default_sampling_params(**overrides, output_kind=RequestOutputKind.DELTA)


def chat_prompt(llm: "LLM", messages: list[dict[str, str]], system: str | None) -> str:
    start = [_message("system", system)] if system else []
    return llm.get_tokenizer().apply_chat_template([*start, *messages])


def stream(llm: "LLM", prompt: str, params: "SamplingParams") -> "tuple[str, RequestOutput]":
    """Print the completion as it comes; returns it whole, and the last output."""
    parts: list[str] = []
    final = None
    for output in _outputs(llm, prompt, params):
        parts.append(output.outputs[0].text)
        click.echo(parts[-1], nl=False)
        final = output
    assert final is not None
    return "".join(parts), final


def _outputs(llm: "LLM", prompt: str, params: "SamplingParams") -> "Iterator[RequestOutput]":
    llm.engine.add_request(f"generate-{time.monotonic_ns()}", prompt, params)
    while llm.engine.has_work:
        yield from llm.engine.step()


def converse(llm: "LLM", params: "SamplingParams", *, system: str | None, stats: bool, opened_s: float) -> None:
    """A conversation: one message a line, empty line or end of input to leave."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = click.prompt("you", prompt_suffix="> ", default="", show_default=False, err=True)
        except click.Abort:
            line = ""
        if not line:
            return
        messages.append(_message("user", line))
        answer, final = stream(llm, chat_prompt(llm, messages, system), params)
        click.echo()
        messages.append(_message("assistant", answer))
        if stats:
            print_stats(llm, final, opened_s)


def print_stats(llm: "LLM", final: "RequestOutput", opened_s: float) -> None:
    """Times of the last request and where its graphs came from, on stderr."""
    from rich.console import Console
    from rich.table import Table

    counted, metrics = llm.engine.stats(), final.metrics
    table = Table(show_header=False)
    table.add_row("start-up", f"{opened_s:.2f} s")
    table.add_row("prompt", f"{len(final.prompt_token_ids)} tokens")
    if metrics.first_token_s is not None and metrics.last_token_s is not None:
        table.add_row("TTFT", f"{(metrics.first_token_s - metrics.arrival_s) * 1e3:.1f} ms")
        num_more = counted.num_generated_tokens - 1
        decode_s = metrics.last_token_s - metrics.first_token_s
        if num_more > 0 and decode_s > 0:
            table.add_row("TPOT", f"{decode_s / num_more * 1e3:.2f} ms ({num_more / decode_s:.1f} tok/s)")
    if metrics.num_draft_tokens:
        table.add_row("drafts accepted", f"{metrics.num_accepted_tokens} of {metrics.num_draft_tokens} tokens")
    if metrics.num_forced_tokens:
        table.add_row("forced by the structure", f"{metrics.num_forced_tokens} tokens")
    table.add_row("finished", str(final.outputs[0].finish_reason))
    for (part, outcome, reason), count in sorted(counted.graph_cache.choices.items()):
        table.add_row(f"steps, {part}", f"{count} {outcome} ({reason})")
    Console(stderr=True).print(table)


def _message(role: str, content: str | None) -> dict[str, str]:
    return {"role": role, "content": content or ""}


if __name__ == "__main__":
    main()
