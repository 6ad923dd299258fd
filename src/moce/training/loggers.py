"""TensorBoard, Weights & Biases and MLflow, through Lightning's loggers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from moce.config import LoggerName
from moce.errors import MoceError
from moce.runs.files import write_json
from moce.runs.model import LOGGERS, STATE, TENSORBOARD

PROJECT = "moce"  # of W&B; the experiment of MLflow
# What has to be importable for each logger.
PACKAGES: dict[LoggerName, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb", "pytorch_lightning"),
    "mlflow": ("mlflow", "sqlalchemy", "pytorch_lightning"),
}


def check_loggers(names: Iterable[LoggerName]) -> None:
    """Raise MoceError if a logger's package is not installed."""
    for name in names:
        if not all(find_spec(package) for package in PACKAGES[name]):
            raise MoceError(
                f"{name} is not installed: pip install 'moce[{name}]', or leave it out of --logger"
            )


def open_loggers(
    names: Sequence[LoggerName], folder: Path, resumed_step: int, config: dict[str, Any]
) -> list[Any]:
    """Lightning loggers, with `log_metrics(values, step)` and `finalize(status)`.

    A resumed run goes on in the same run of W&B and MLflow. Raises MoceError if a service does not
    accept the run.
    """
    known: dict[str, str] = {}
    file = folder / STATE / LOGGERS
    if resumed_step and file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
    loggers = []
    for name in names:
        try:
            logger = OPEN[name](folder, resumed_step, known.get(name))
            if name != "tensorboard":  # it would write a file of its own for them
                if name not in known:  # MLflow refuses changes, such as resume's
                    logger.log_hyperparams(config)
                known[name] = str(logger.experiment.id if name == "wandb" else logger.run_id)
        except Exception as error:  # of the service: anything may come back
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise MoceError(f"cannot log to {name}: {reason}; leave it out of --logger") from None
        loggers.append(logger)
    if known:
        write_json(file, known)
    return loggers


def log_picture(logger: Any, name: str, picture: np.ndarray, step: int) -> None:
    """A picture [h, w, 3] uint8 to TensorBoard or W&B; MLflow, which would need a store, gets none."""
    kind = type(logger).__name__
    if kind == "TensorBoardLogger":
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif kind == "WandbLogger":
        logger.log_image(name, [picture], step)


def close_loggers(loggers: Iterable[Any], *, finished: bool) -> None:
    """Send what is left. finished: the run came to its end."""
    for logger in loggers:
        logger.finalize("success" if finished else "failed")
        if type(logger).__name__ == "WandbLogger":
            with suppress(Exception):  # the run is done, whatever the service says
                logger.experiment.finish(exit_code=0 if finished else 1)


def _tensorboard(folder: Path, resumed_step: int, _: str | None) -> Any:
    """Events after `resumed_step` are hidden."""
    from lightning_fabric.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, TENSORBOARD, "", purge_step=resumed_step and resumed_step + 1)


def _wandb(folder: Path, _: int, run: str | None) -> Any:
    """Online or offline as WANDB_MODE says; files in the run's folder."""
    from pytorch_lightning.loggers import WandbLogger

    return WandbLogger(project=PROJECT, name=folder.name, save_dir=folder, id=run, resume="allow")


def _mlflow(folder: Path, _: int, run: str | None) -> Any:
    """To MLFLOW_TRACKING_URI, or to mlflow.db beside the run."""
    from pytorch_lightning.loggers import MLFlowLogger

    local = f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"
    place = os.environ.get("MLFLOW_TRACKING_URI") or local
    return MLFlowLogger(PROJECT, run_name=folder.name, tracking_uri=place, run_id=run)


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
