"""Kill training at random moments, resume it, and compare with an uninterrupted run, bit by bit.

    python -m benchmarks.kill --kills 20

Real commands in processes of their own, on the embedded images; SIGKILL gives them no chance to put
anything in order. They are forked from one that has imported moce and done nothing else, so that the
time, and the kills, fall on the work. Ends with status 1 if a run that was killed differs from the
one that was not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "lightning_fabric",
        *(f"moce.commands.{command}" for command in ("train", "finetune", "cluster")),
    ]
)
RUNTIME = ["--device", "cpu", "--precision", "float32", "--threads", "1"]
SMALL = [
    *("--model", "vit_tiny_patch16_224", "--img-size", "32", "--decoder-dim", "32"),
    *("--model-args", "{patch_size: 4, embed_dim: 64, depth: 4, num_heads: 2}"),
    *("--decoder-depth", "1", "--decoder-heads", "2"),
]
DATA, TASK = "demo:clothes", "demo:digits"
COMPARED = ("model.safetensors", "metrics.jsonl")  # of every run, to the byte


@dataclass
class Story:
    """What was done to the runs: a line per kill or comparison; different: the runs that differ."""

    lines: list[str] = field(default_factory=list)
    kills: int = 0
    runs: int = 0
    different: list[str] = field(default_factory=list)

    def tell(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)


def commands(root: Path, steps: int) -> dict[str, list[str]]:
    """The commands to kill, without --out; `root` holds the runs that they start from."""
    # Rows, checkpoints and the end fall on different steps.
    steady = ["--steps", str(steps), "--batch-size", "32", "--log-every", "5", "--save-every", "7"]
    train = ["train", DATA, "--mae", str(root / "mae"), "--clusters", str(root / "clusters")]
    few = ["--num-labels", "64", "--micro-batch-size", "16"]
    return {
        "pretrain": ["pretrain", DATA, *SMALL, *steady, *RUNTIME],
        "cluster": ["cluster", DATA, "--mae", str(root / "mae"), "--num-clusters", "12", *RUNTIME],
        "moce": [*train, "--num-experts", "3", *steady, *RUNTIME],
        "token_moe": [*train, "--method", "token_moe", "--num-experts", "3", *steady, *RUNTIME],
        "finetune": ["finetune", str(root / "mae"), TASK, *few, *steady, *RUNTIME],
    }


def work(words: list[str], said: Path) -> None:
    """In a process of its own: one command of moce, what it says going to a file."""
    from moce.cli import main

    with said.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.exit(main(words))


def run(words: list[str], seconds: float | None = None) -> bool:
    """Run a command, killed after so many seconds; whether it came to its end before.

    Raises RuntimeError if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        process = PROCESSES.Process(target=work, args=(words, said))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        if process.exitcode not in (0, -9):
            raise RuntimeError(f"{' '.join(words)}: {said.read_text()}")
        return process.exitcode == 0


def finish(words: list[str]) -> float:
    """Run a command to its end; the seconds it took."""
    began = time.perf_counter()
    run(words)
    return time.perf_counter() - began


def torment(
    story: Story, words: list[str], straight: Path, out: Path, kills: int, longest: float
) -> None:
    """Kill and resume one run until it has ended or there are no kills left; then compare."""
    words = [*words, "--out", str(out), "--resume"]
    while story.kills < kills:
        seconds = random.uniform(0, longest)
        if run(words, seconds):
            break
        story.kills += 1
        story.tell(f"kill {story.kills}: {out.name} after {seconds:.1f} s, {found(out)}")
    else:
        finish(words)
    story.runs += 1
    same = all((straight / name).read_bytes() == (out / name).read_bytes() for name in COMPARED)
    left = [path.name for path in out.rglob(".*")]
    if not same or left:
        story.different.append(out.name)
    story.tell(f"{out.name}: {'the same' if same else 'DIFFERENT'} {left or ''}".rstrip())


def found(out: Path) -> str:
    """What a killed run left."""
    metrics = out / "metrics.jsonl"
    rows = metrics.read_text().count("\n") if metrics.is_file() else 0
    steps = [path.stem for path in sorted(out.glob("state/step_*"))]
    ended = ", model.json" if (out / "model.json").is_file() else ""
    return f"{rows} rows, {steps[-1] if steps else 'no checkpoint'}{ended}"


def kill_runs(root: Path, names: list[str], kills: int, steps: int) -> Story:
    """Straight runs of the commands of `names`, then killed ones until there were so many kills."""
    story = Story()
    known = commands(root, steps)
    seconds = {}
    run(["pretrain", "--help"])  # starts the process that the others are forked from
    finish([*known["pretrain"], "--out", str(root / "mae")])
    finish([*known["cluster"], "--out", str(root / "clusters")])
    for name in names:
        seconds[name] = finish([*known[name], "--out", str(root / f"{name}_straight")])
        story.tell(f"{name}: {seconds[name]:.1f} s uninterrupted")
    for number, name in enumerate(cycle(names)):
        if story.kills >= kills:
            return story
        out, straight = root / f"{name}_{number}", root / f"{name}_straight"
        torment(story, known[name], straight, out, kills, seconds[name])
    raise AssertionError("unreachable")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--commands", default="pretrain,cluster,moce,finetune")
    options = parser.parse_args(words)
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        story = kill_runs(Path(folder), options.commands.split(","), options.kills, options.steps)
    outcome = f"DIFFERENT: {', '.join(story.different)}" if story.different else "all the same"
    print(f"{story.kills} kills in {story.runs} runs: {outcome}")
    return int(bool(story.different))


if __name__ == "__main__":
    sys.exit(main())
