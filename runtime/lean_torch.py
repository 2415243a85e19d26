"""PyTorch without the parts that serving does not use: a third of the time that ``import torch`` takes.

Exporting, its meta kernels, nested tensors and data loaders are Python modules that ``import torch`` runs to the end
for whoever may want them. Here each is a module that runs when somebody asks it for something. Nobody asks the meta
kernels: they register themselves, so they run before anything that traces is imported.
"""

import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

META_KERNELS = "torch._meta_registrations"
PARTS = frozenset({META_KERNELS, "torch.export", "torch.nested", "torch.utils.data"})
# Of what traces, what `import torch` itself leaves out. torch.export imports torch._export.
_TRACERS = frozenset({"torch._export", "torch._dynamo", "torch._inductor"})

# A part that runs may ask another one.
_lock = threading.RLock()


def defer_parts() -> None:
    """Have them run later. Without effect on parts that were imported before."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_deferred(name: str) -> bool:
    """Whether the part is imported and has not run."""
    return isinstance(sys.modules.get(name), _Part)


class _Part(ModuleType):
    """A module that was found and has not run."""

    def __getattr__(self, name: str) -> Any:
        # Whoever only looks around (inspect does so in all modules) wants nothing of it.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _run(self)
        return getattr(self, name)


def _run(part: ModuleType) -> None:
    with _lock:
        if not isinstance(part, _Part):
            return
        spec = part.__spec__
        assert spec is not None and isinstance(spec.loader, _Later), "it was found here"
        # Whatever it lacks from now on, it lacks.
        object.__setattr__(part, "__class__", ModuleType)
        part.__loader__ = spec.loader = spec.loader.loader
        spec.loader.exec_module(part)


class _Later(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Part(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet."""


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _TRACERS and is_deferred(META_KERNELS):
            _run(sys.modules[META_KERNELS])
        if fullname not in PARTS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Later(spec.loader)
        return spec
