"""Chunks of an OpenAI event stream, with everything but the new text encoded once per request."""

import json
from typing import Any

# The C function behind json.dumps of a string, without building an encoder per call.
quote = json.encoder.encode_basestring_ascii


def dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def usage(num_prompt: int, num_completion: int, num_cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


class ChunkEncoder:
    """Encodes the chunks of one stream: a fixed head, one choice, a tail that may carry usage."""

    def __init__(self, head: dict[str, Any], *, include_usage: bool, continuous_usage: bool) -> None:
        self._head = "data: " + dumps(head)[:-1] + ',"choices":['
        self.include_usage = include_usage
        self.continuous_usage = continuous_usage
        # OpenAI: with include_usage every chunk has the field, null until the last.
        self._tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    def chunk(self, choice: str, usage_so_far: dict[str, Any] | None = None) -> str:
        """choice is a JSON object; usage_so_far is written when continuous usage was asked for."""
        if self.continuous_usage and usage_so_far is not None:
            return f'{self._head}{choice}],"usage":{dumps(usage_so_far)}}}\n\n'
        return f"{self._head}{choice}{self._tail}"

    def last_chunk(self, totals: dict[str, Any]) -> str:
        """No choice, only the fields of ``totals``: usage, metrics."""
        return f"{self._head}],{dumps(totals)[1:]}\n\n"
