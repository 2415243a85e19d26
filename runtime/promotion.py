"""Graphs for hot sizes while serving: another process compiles them, a thread loads them, a step picks them up.

The step's thread decides (`between_steps`), on counts it has anyway; everything slow happens elsewhere. The server
never imports a compiler: `python -m xllm_compile.promote` compiles, checks the new graphs against the eager programs,
and leaves them in the graph store, where the next start finds them. Where that cannot be done, serving goes on.
"""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xllm_compile.runtime.artifact import file_digest
from xllm_compile.runtime.compiled_graph import CompiledGraph
from xllm_compile.runtime.graph_cache import GraphCache, GraphFunction

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "xllm_compile.promote")
NO_COMPILER = 3
"""Exit code of the command on a machine that cannot compile at all."""

_CHECK_STEPS = 64
_AGE_STEPS = 16384
_COMPILE_LIMIT_S = 1800


@dataclass(frozen=True, kw_only=True, slots=True)
class PromotionConfig:
    store: Path
    """The graph store: the folder that the compiler of this user keeps graphs in."""
    max_bytes: int = 128 << 20
    """Of the promoted graphs' files, the least valuable of which go beyond it."""
    min_steps: int = 512
    """A size must have been run this often before it is worth a compilation."""
    min_steps_saved: float = 16.0
    """Predicted time that a graph of its own would have saved so far, in steps of that size."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "min_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def hottest(
    demand: Mapping[int, int],
    saving: Callable[[int], float],
    taken: Collection[int],
    config: PromotionConfig,
    least_value: float = 0.0,
) -> int | None:
    """The size that most deserves a graph of its own, None when none does.

    demand: steps by size; saving: share of such a step's time that its own graph would save; taken: sizes that have
    one, or cannot; least_value: steps saved by what would have to go for it.
    """
    values = {
        size: count * saving(size) for size, count in demand.items() if count >= config.min_steps and size not in taken
    }
    best = max(values, key=lambda size: (values[size], -size), default=None)
    if best is None or values[best] < max(config.min_steps_saved, least_value):
        return None
    return best


def coldest(values: Mapping[int, float], num_bytes: Mapping[int, int], max_bytes: int) -> list[int]:
    """What to let go, the least value a byte first, so that the rest fits."""
    total = sum(num_bytes.values())
    gone = []
    for size in sorted(num_bytes, key=lambda size: (values[size] / num_bytes[size], -size)):
        if total <= max_bytes:
            break
        gone.append(size)
        total -= num_bytes[size]
    return gone


@dataclass(frozen=True, kw_only=True, slots=True)
class PromotedGraphs:
    """The compiled graphs of one size, as the promote command describes them (see write_entry)."""

    size: int
    files: dict[str, Path]
    """By region."""
    digests: dict[str, str]
    entry: Path

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def entry_path(store: Path, build_key: str, size: int) -> Path:
    return store / "promoted" / f"{build_key}-T{size}.json"


def write_entry(store: Path, build_key: str, size: int, files: Mapping[str, str]) -> Path:
    """Note for later starts that ``files`` (region -> name in the store) are the graphs of ``size``."""
    path = entry_path(store, build_key, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    digests = {region: file_digest(store / name) for region, name in files.items()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"size": size, "files": dict(files), "digests": digests}))
    os.replace(temporary, path)
    return path


def read_entry(path: Path) -> PromotedGraphs:
    """Raises ValueError where it is none."""
    try:
        values = json.loads(path.read_text())
        files = {region: path.parent.parent / name for region, name in values["files"].items()}
        return PromotedGraphs(size=int(values["size"]), files=files, digests=dict(values["digests"]), entry=path)
    except (OSError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"{path} describes no graphs: {err!r}") from err


class GraphPromoter:
    """Promotes sizes of one cache. `between_steps` belongs to the step's thread, `stats` to any."""

    def __init__(self, root: Path, build_key: str, config: PromotionConfig, command: Sequence[str] = COMMAND) -> None:
        self.config = config
        self._root = root
        self._build_key = build_key
        self._command = tuple(command)
        self._num_steps = 0
        self._is_busy = True
        """A request is under way. At first: the graphs of earlier runs."""
        self._can_compile = True
        self._tried: set[int] = set()
        self._kept: dict[int, PromotedGraphs] = {}
        self._bytes: dict[int, int] = {}
        self._events: Counter[str] = Counter()
        self._requests: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[PromotedGraphs, dict[str, GraphFunction]] | None] = queue.SimpleQueue()
        """Loaded graphs; None ends a request."""
        self._child: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._work, name="xllm-promotion", daemon=True)
        self._thread.start()

    def between_steps(self, cache: GraphCache) -> None:
        """Take what is ready, let go what is too much, and ask for the next: a few microseconds, no waiting."""
        self._num_steps += 1
        while not self._ready.empty():
            self._take(cache)
        if self._num_steps % _CHECK_STEPS == 0 and self._can_compile and not self._is_busy:
            size = hottest(
                cache.demand, cache.saving, {*cache.buckets, *self._tried}, self.config, self._least_value(cache)
            )
            if size is not None:
                self._is_busy = True
                self._tried.add(size)
                self._requests.put(size)
        if self._num_steps % _AGE_STEPS == 0:
            # Yesterday's traffic must not keep today's out.
            for size, count in list(cache.demand.items()):
                cache.demand[size] = count // 2
            self._tried &= {size for _, size in cache.failed} | cache.promoted

    def _take(self, cache: GraphCache) -> None:
        found = self._ready.get()
        if found is None:
            self._is_busy = False
            return
        graphs, functions = found
        cache.add(graphs.size, functions)
        self._kept[graphs.size] = graphs
        self._bytes[graphs.size] = graphs.num_bytes
        self._events["loaded"] += 1
        logger.info("steps of %d tokens have a graph of their own now", graphs.size)
        values = {size: cache.demand[size] * cache.saving(size) for size in self._bytes}
        for size in coldest(values, self._bytes, self.config.max_bytes):
            cache.remove(size)
            self._events["evicted"] += 1
            del self._bytes[size]
            # The file of graphs goes with the store's own trimming: other artifacts may share it.
            self._kept.pop(size).entry.unlink(missing_ok=True)

    def _least_value(self, cache: GraphCache) -> float:
        """Steps saved by the promoted graph that saves least, when there is no room for one more."""
        if not self._bytes or sum(self._bytes.values()) + max(self._bytes.values()) <= self.config.max_bytes:
            return 0.0
        return min(cache.demand[size] * cache.saving(size) for size in self._bytes)

    def stats(self) -> dict[str, int]:
        """Counts of what happened: compiled, loaded, failed, evicted, no_compiler."""
        return dict(self._events)

    @property
    def promoted_bytes(self) -> int:
        return sum(dict(self._bytes).values())

    def close(self) -> None:
        """End the compilation under way, if any."""
        self._can_compile = False
        self._requests.put(None)
        child = self._child
        if child is not None:
            child.kill()
        self._thread.join()

    def _work(self) -> None:
        for path in sorted(self.config.store.glob(f"promoted/{self._build_key}-T*.json")):
            self._load(path)
        self._ready.put(None)
        while (size := self._requests.get()) is not None:
            if self._compile(size):
                self._load(entry_path(self.config.store, self._build_key, size))
            self._ready.put(None)

    def _compile(self, size: int) -> bool:
        command = [*self._command, str(self._root), "--tokens", str(size), "--store", str(self.config.store)]
        logger.info("compiling a graph for steps of %d tokens in the background", size)
        try:
            self._child = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
            )
            _, errors = self._child.communicate(timeout=_COMPILE_LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as err:
            if self._child is not None:
                self._child.kill()
                self._child.wait()
            self._fail(size, str(err))
            return False
        if self._child.returncode == 0:
            self._events["compiled"] += 1
            return True
        reason = (errors.strip().splitlines() or ["no message"])[-1]
        if self._child.returncode == NO_COMPILER:
            self._can_compile = False
            self._events["no_compiler"] += 1
            logger.warning("hot sizes get no graphs of their own: %s; the artifact's graphs serve on", reason)
        elif self._child.returncode > 0:
            self._fail(size, reason)
        return False

    def _load(self, path: Path) -> None:
        """Everything about a library that takes time, off the step's thread."""
        try:
            graphs = read_entry(path)
            functions: dict[str, GraphFunction] = {}
            for region, file in graphs.files.items():
                if file_digest(file) != graphs.digests[region]:
                    raise ValueError(f"{file} is damaged")
                # The trimming of the store goes by age.
                os.utime(file)
                # Links without the interpreter lock: steps go on.
                functions[region] = CompiledGraph(file)
        except (ValueError, OSError, RuntimeError) as err:
            path.unlink(missing_ok=True)
            self._fail_load(path, err)
            return
        self._ready.put((graphs, functions))

    def _fail(self, size: int, reason: str) -> None:
        self._events["failed"] += 1
        logger.warning("no graph for steps of %d tokens: %s", size, reason)

    def _fail_load(self, path: Path, err: Exception) -> None:
        self._events["failed"] += 1
        logger.warning("the promoted graphs of %s are dropped: %s", path.name, err)
