"""timm without what only few of its functions use: half of the time that its import takes.

timm imports torchvision's models, torch's compiler, the hub's client and wandb, each for a function or two.
While timm is imported, stand-ins take their places. Each imports the real module when it is first used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

# Module: the functions that are imported from it by name.
DEFERRED: dict[str, tuple[str, ...]] = {
    "torch._dynamo.utils": ("is_compile_supported",),  # by torchvision.ops
    "torchvision.models": (),
    "torchvision.models.feature_extraction": ("create_feature_extractor", "get_graph_node_names"),
    "huggingface_hub.hf_api": ("HfApi", "model_info"),
    "huggingface_hub.file_download": ("hf_hub_download",),
    "wandb": (),
}


class StandIn(ModuleType):
    """A module that is imported when anything but `functions`, which import it when called, is used."""

    def __init__(self, name: str, functions: tuple[str, ...]) -> None:
        super().__init__(name)
        folders = _folders(name)
        if folders:
            self.__path__ = folders  # modules in it can be imported
        for function in functions:
            setattr(self, function, self._deferred(function))

    def _deferred(self, function: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: getattr(self._real(), function)(*args, **kwargs)

    def _real(self) -> ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return import_module(self.__name__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # which Python asks of every module
            raise AttributeError(name)
        return getattr(self._real(), name)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Put stand-ins in the places of modules that are not imported yet, and take them away at the end."""
    import torch.compiler

    placed = {name: StandIn(name, used) for name, used in DEFERRED.items() if _is_ahead(name)}
    disable = torch.compiler.disable
    sys.modules.update(placed)
    # As a decorator it imports the compiler; torch's own, which does not, waits for the first call.
    torch.compiler.disable = _disable
    try:
        yield
    finally:
        torch.compiler.disable = disable
        for name, module in placed.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _folders(name: str) -> list[str]:
    """Where the modules of a package are; of other modules, nothing. Imports nothing."""
    top, *inner = name.split(".")
    spec = find_spec(top)
    places = (spec.submodule_search_locations if spec else None) or ()
    return [str(path) for place in places if (path := Path(place, *inner)).is_dir()]


def _is_ahead(name: str) -> bool:
    """Whether a module, which is installed, has not been imported yet."""
    top = name.partition(".")[0]
    return name not in sys.modules and (top in sys.modules or find_spec(top) is not None)


def _disable(fn: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    import torch

    return torch._disable_dynamo(fn, recursive)


class _Finder(MetaPathFinder):
    """Finds timm, once, as the next finder would, and lets it be executed among the stand-ins."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = find_spec("timm")
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_lightly(module: ModuleType) -> None:
            with stand_ins():
                execute(module)

        spec.loader.exec_module = execute_lightly  # type: ignore[method-assign]
        return spec


def defer_imports() -> None:
    """Let the first import of timm, if it is to come, be a light one."""
    if "timm" not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
