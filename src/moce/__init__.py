"""moce: pre-train one masked autoencoder, get a vision backbone for every task.

    moce.pretrain("photos/", out="runs/mae")
    moce.cluster("photos/", mae="runs/mae", out="runs/clusters", num_clusters=64)
    moce.train("photos/", mae="runs/mae", clusters="runs/clusters", out="runs/moce")
    vit = moce.load("runs/moce").customize("task_images/")

Every command is a function. Its keyword arguments are the settings of its class in `moce.config`, and
it returns a small result. Importing moce is light: torch is imported by the first call.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moce.errors import MoceError

if TYPE_CHECKING:
    from moce.customization.bank import Bank

__version__ = version("moce")
FUNCTIONS = (
    *(
        "cluster",
        "convert",
        "customize",
        "demo",
        "distill",
        "doctor",
        "embed",
        "evaluate",
        "explore",
        "export",
    ),
    *("finetune", "headroom", "pack", "predict", "pretrain", "probe", "push", "report", "run"),
    "train",
)
__all__ = ["MoceError", "load", *FUNCTIONS]


def load(run: str | Path) -> Bank:
    """Load a `moce train` run, ready to `.select` and `.customize`."""
    from moce.runtime.light_imports import defer_imports

    defer_imports()
    from moce.customization.bank import load as load_bank

    return load_bank(run)


def __getattr__(name: str) -> Any:
    """The function of a command (see commands/registry.py), made when first used.

    Its arguments are the settings, which need pydantic. Type checkers and editors read __init__.pyi.
    """
    if name not in FUNCTIONS:
        raise AttributeError(f"module 'moce' has no attribute '{name}'")
    from moce.commands.registry import COMMANDS

    function = globals()[name] = COMMANDS[name].function()
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
