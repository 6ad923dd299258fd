"""A command that kills itself at its n-th dealing with a file; a program for test_kill.py.

    python tests/die_at_writes.py STRIDE OUT STRAIGHT WORDS...

Runs `moce WORDS --out OUT` in processes forked from this one, the n-th killed by itself at its n-th
chance: when a temporary file has been made, half written, when it is whole but has no name yet, when
it has its name, and half way through a line of a log. Each is resumed and compared with STRAIGHT.
STRIDE 3 takes every third chance.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import timm  # noqa: F401 - imported before any fork

import moce.runs.files
from moce.cli import main
from moce.commands import finetune, pretrain, train  # noqa: F401
from moce.training import metrics as log

COMPARED = ("model.safetensors", "metrics.jsonl")


class Chances:
    """Counts what could be the end, and makes it the end when its number has come."""

    def __init__(self, fatal: int) -> None:
        self.seen, self.fatal = 0, fatal

    def come(self) -> bool:
        self.seen += 1
        return self.seen == self.fatal


def arm(fatal: int) -> Chances:
    """Put chances to die before and after what moce does with files."""
    chances = Chances(fatal)
    touch, replace, append = Path.touch, Path.replace, moce.runs.files.append_line

    def touching(self, *given, **more):
        touch(self, *given, **more)
        if chances.come():
            self.write_bytes(b"half a fi")
            die()

    def replacing(self, target):
        if chances.come():
            die()
        done = replace(self, target)
        if chances.come():
            die()
        return done

    def appending(path, content):
        if chances.come():
            with path.open("a") as file:
                file.write(json.dumps(content)[:20])
            die()
        append(path, content)

    Path.touch, Path.replace, log.append_line = touching, replacing, appending
    return chances


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forked(words: list[str], fatal: int) -> bool:
    """Run a command in a process of its own; whether it died on its way."""
    child = os.fork()
    if child == 0:
        arm(fatal)
        os._exit(main(words))
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0, status
    return killed


def run(stride: int, out: Path, straight: Path, words: list[str]) -> int:
    """How many chances there were; of every `stride` of them one was taken."""
    assert not forked([*words, "--out", str(straight)], 0)
    command, number = [*words, "--out", str(out)], 1
    while forked(command, number):
        assert not forked([*command, "--resume"], 0), number
        for name in COMPARED:
            assert (out / name).read_bytes() == (straight / name).read_bytes(), (number, name)
        hidden = [path for path in out.rglob(".*") if path.is_file()]
        assert not hidden, (number, hidden)
        shutil.rmtree(out)
        number += stride
    return number - 1


if __name__ == "__main__":
    chances = run(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    print(f"chances: {chances}")
