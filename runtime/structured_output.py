"""What a completion must look like: a JSON schema, a regular expression, a grammar or one of a few texts. Data only.

`grammar.py` compiles it, `token_matcher.py` follows one sequence through it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

StructuredKind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]

# A schema of 56 thousand characters compiles in 0.1 s, one of four times the size in 1.4 s.
MAX_SOURCE_CHARS = 128 * 1024
MAX_CHOICES = 1024
# Where the grammar library looks for its options in a schema, and the one for JSON without blanks.
JSON_OPTIONS_KEY = "x-guidance"
COMPACT_JSON = {"whitespace_flexible": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasoningText:
    """Free text that may come first. What must look like something begins after it."""

    start: str
    """Opens it; a completion that does not begin with it has no reasoning."""
    end: str
    is_open: bool = False
    """The prompt ends inside the reasoning: `start` is part of it."""


def schema_object(schema: dict[str, Any] | bool) -> dict[str, Any]:
    """A JSON schema, which may be a boolean, as an object."""
    return ({} if schema else {"not": {}}) if isinstance(schema, bool) else schema


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutput:
    """One constraint, comparable and hashable by content. Raises ValueError on a source that is too long."""

    kind: StructuredKind
    source: str = ""
    """The JSON text of a schema or of a list of choices, a regular expression, or a grammar (Lark or GBNF)."""
    reasoning: ReasoningText | None = None

    def __post_init__(self) -> None:
        if len(self.source) > MAX_SOURCE_CHARS:
            raise ValueError(
                f"the {self.kind} has {len(self.source)} characters, at most {MAX_SOURCE_CHARS} are taken; simplify it"
            )

    @property
    def schema(self) -> dict[str, Any] | None:
        """Of JSON of whatever kind; None where something else is asked for."""
        if self.kind == "json_object":
            return {"type": "object"}
        return schema_object(json.loads(self.source)) if self.kind == "json_schema" else None

    def compact(self) -> "StructuredOutput":
        """The same JSON with no blank where it needs none. The model then chooses values only: keys and punctuation
        follow. Raises ValueError for what is no JSON."""
        schema = self.schema
        if schema is None:
            raise ValueError(f"a {self.kind} is no JSON, whose blanks could be left out")
        return replace(self, kind="json_schema", source=json.dumps({**schema, JSON_OPTIONS_KEY: COMPACT_JSON}))

    @classmethod
    def json_schema(cls, schema: Any, reasoning: ReasoningText | None = None) -> "StructuredOutput":
        """schema is a mapping, a boolean, or JSON text of one. Raises ValueError when it is none of them."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as err:
                raise ValueError(f"the JSON schema is not JSON: {err}") from None
        if not isinstance(schema, dict | bool):
            raise ValueError(f"the JSON schema must be an object or a boolean, not {type(schema).__name__}")
        return cls(kind="json_schema", source=json.dumps(schema), reasoning=reasoning)

    @classmethod
    def choice(cls, choices: Sequence[str], reasoning: ReasoningText | None = None) -> "StructuredOutput":
        """One of the texts. Raises ValueError when there are none or too many."""
        if isinstance(choices, str) or not all(isinstance(choice, str) and choice for choice in choices):
            raise ValueError("choice must be a list of strings, none of them empty")
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise ValueError(f"choice has {len(choices)} strings, must have 1 to {MAX_CHOICES}")
        return cls(kind="choice", source=json.dumps(list(choices)), reasoning=reasoning)
