"""Commands started by torchrun as two processes, and the lines they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def torchrun(*words: object, **variables: str) -> subprocess.Popen[str]:
    """Two processes of a program."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    pipe = subprocess.PIPE
    command = [*start, *map(str, words)]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def moce_words(command: str, settings: dict[str, Any]) -> list[object]:
    """A command of moce, its settings in a recipe beside the output folder."""
    recipe = Path(f"{settings['out']}.yaml")
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    recipe.write_text(yaml.safe_dump(plain))
    return ["-m", "moce", command, "--config", recipe]


def moce_lines(text: str) -> list[str]:
    """The lines that moce printed, without those of torchrun."""
    return [line for line in text.splitlines() if re.match(r"moce \w+: ", line)]


def wait_until(true: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
