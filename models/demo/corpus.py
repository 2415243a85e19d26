"""The training corpus: the source of the running interpreter's standard library.

Every choice is a function of file paths and file contents, never of directory order or of the clock, so one
Python version always gives one corpus and one held-out split.
"""

import ast
import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

HELD_OUT_PERCENT = 4
LIBRARY_REPEATS = 2
TEST_PERCENT = 50
MAX_FUNCTION_CHARACTERS = 1600
MAX_CHAT_DOCUMENTS = 5000

# Generated tables and files that are test inputs rather than programs.
EXCLUDED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "encoded_modules", "data"}
)
EXCLUDED_PREFIXES = ("bad", "badsyntax", "config-")
TEST_DIRECTORIES = frozenset({"test", "tests", "idle_test"})
MAX_DIGIT_FRACTION = 0.15

SYSTEM_PROMPT = "You are a helpful assistant."


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One standard-library file; ``path`` is relative to the library and uses forward slashes."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        return not TEST_DIRECTORIES.isdisjoint(self.path.split("/"))

    @property
    def bucket(self) -> int:
        """A number in 0..9999 fixed by the path; its two halves decide the split and the weighting."""
        return stable_hash(self.path) % 10_000

    @property
    def is_held_out(self) -> bool:
        return self.bucket % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Documents to train on, already weighted by repetition, and the files kept away from training."""

    training_documents: tuple[str, ...]
    held_out: tuple[SourceFile, ...]


def stable_hash(text: str) -> int:
    """A hash that, unlike ``hash``, is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def standard_library_files() -> list[SourceFile]:
    """Every usable source file in path order: UTF-8, parseable, not a table, not a copy of an earlier file."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files: list[SourceFile] = []
    seen: set[str] = set()
    for absolute in sorted(library.rglob("*.py")):
        path = absolute.relative_to(library)
        if not EXCLUDED_DIRECTORIES.isdisjoint(path.parts) or path.parts[0].startswith(EXCLUDED_PREFIXES):
            continue
        try:
            text = absolute.read_bytes().decode("utf-8").replace("\r\n", "\n")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        if not text.strip() or text in seen or is_table(text):
            continue
        seen.add(text)
        files.append(SourceFile(path=path.as_posix(), text=text))
    if not files:
        raise FileNotFoundError(
            f"no Python source under the standard library directory {str(library)!r}; "
            "run with an interpreter whose standard library is installed as .py files"
        )
    return files


def is_table(text: str) -> bool:
    """Whether the file is mostly numbers; such files teach a small model nothing but digits."""
    return sum(character.isdigit() for character in text) > MAX_DIGIT_FRACTION * len(text)


def build_corpus(*, seed: int) -> Corpus:
    """Read, split, weight and shuffle; ``seed`` orders the documents and picks the chat wordings."""
    files = standard_library_files()
    training = [file for file in files if not file.is_held_out]
    library = [file.text for file in training if not file.is_test]
    # Tests are twice the size of the library and read alike, so half of them is enough.
    tests = [file.text for file in training if file.is_test and file.bucket // 100 < TEST_PERCENT]
    documents = library * LIBRARY_REPEATS + tests + chat_documents(training, seed=seed)
    random.Random(seed).shuffle(documents)
    return Corpus(
        training_documents=tuple(documents),
        held_out=tuple(file for file in files if file.is_held_out),
    )


def chat_documents(files: list[SourceFile], *, seed: int) -> list[str]:
    """ChatML conversations that ask for a real function of the library and answer with its source."""
    rng = random.Random(seed)
    documents = [
        conversation(function, source, rng)
        for file in files
        if not file.is_test
        for function, source in documented_functions(file.text)
    ]
    rng.shuffle(documents)
    return documents[:MAX_CHAT_DOCUMENTS]


def documented_functions(text: str) -> Iterator[tuple[ast.FunctionDef, str]]:
    """The functions and methods of one file that have a docstring, each with its dedented source."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
            continue
        source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()
        if source.startswith("def ") and len(source) <= MAX_FUNCTION_CHARACTERS:
            yield node, source


def conversation(function: ast.FunctionDef, source: str, rng: random.Random) -> str:
    """One request, in one of a few wordings, and its answer; a system turn in one of four."""
    name = function.name
    signature = f"{name}({ast.unparse(function.args)})"
    purpose = (ast.get_docstring(function) or "").partition("\n\n")[0].replace("\n", " ").strip()
    request = rng.choice(
        (
            f"Write a function {name}",
            f"Write a Python function {name}.",
            f"Write a Python function `{signature}`.",
            f"Implement {signature} in Python.",
            f"Write a function {name}. {purpose}",
            f"Write a Python function named {name}: {purpose}",
            f"Write a function {signature} with this docstring: {purpose}",
            f"Complete this function:\ndef {signature}:",
        )
    )
    turns = [("user", request), ("assistant", source)]
    if rng.random() < 0.25:
        turns.insert(0, ("system", SYSTEM_PROMPT))
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in turns)
