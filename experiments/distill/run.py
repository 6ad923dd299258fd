"""Distillation on Mix-32: a student a quarter of its teacher's size, against MAE on the same student.

    python -m experiments.distill.run --runs runs/mix32/main/0 --data runs/mix32/data --out runs/distill

For every task the MoCE run of `experiments.mix32.run` is customized, and `moce distill` makes a student of
that backbone on all pre-training images. The same student is pre-trained by MAE for as many steps,
images and at the same rate, and a student of MAE+ shows what customization adds. All are probed on
the task, as in recipes/suites/mix32.yaml. Finished runs are passed over. The rows go to
`results/cpu.jsonl`; about ten minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import moce
from experiments.mix32.collect import evaluation_rows, merge
from experiments.mix32.measure import sum_seconds
from moce.runs.model import read_metrics, read_timings

HERE = Path(__file__).parent
SUITE = HERE.parents[1] / "recipes" / "suites" / "mix32.yaml"
RUNTIME: dict[str, Any] = {"device": "cpu", "precision": "float32", "threads": 1}
STUDENT = {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 1}
TASKS = ("digits", "fashion", "animals")
TRAINING: dict[str, Any] = {"batch_size": 128, "base_lr": 4e-3, "log_every": 50}
PLAIN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # as the teachers'
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="with mae_plus and moce")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "cpu.jsonl")
    asked = parser.parse_args()
    pool = asked.out / "pool.moce"  # decoded once
    if not pool.is_file():
        moce.pack(asked.data / "pools" / "all.parquet", size=32, out=pool)
    training = {**TRAINING, **RUNTIME, "steps": asked.steps, "seed": asked.seed}
    folders = {"mae_student": _mae(pool, asked.out / "mae_student", training)}
    plus = asked.runs / "mae_plus"
    folders["student_of_mae_plus"] = _distill(
        plus, pool, asked.out / "student_of_mae_plus", training
    )
    merge(asked.results, _costs(folders, asked))
    for task in asked.tasks:
        images = asked.data / "tasks" / f"{task}.parquet"
        teacher = asked.out / task / "teacher"
        if not (teacher / "selection.json").is_file():
            moce.customize(asked.runs / "moce", str(images), out=teacher, **RUNTIME)
        student = _distill(teacher, pool, asked.out / task / "student", training)
        named = {"teacher": teacher, "student": student, "mae_plus": plus, **folders}
        rows = _evaluate(task, named, asked)
        merge(asked.results, [*rows, *_costs({f"student_{task}": student}, asked)])


def _mae(pool: Path, out: Path, training: dict[str, Any]) -> Path:
    if not (out / "model.json").is_file():
        model = {"model": "vit_tiny_patch16_224", "model_args": STUDENT, "img_size": 32}
        moce.pretrain(pool, out=out, overwrite=True, **model, **PLAIN, **DECODER, **training)
    return out


def _distill(teacher: Path, pool: Path, out: Path, training: dict[str, Any]) -> Path:
    if not (out / "distillation.json").is_file():
        model = {"model": "vit_tiny_patch16_224", "model_args": STUDENT}
        moce.distill(teacher, pool, out=out, overwrite=True, **model, **training)
    return out


def _evaluate(task: str, backbones: dict[str, Path], asked: Any) -> list[dict[str, Any]]:
    """The rows of a task's probes."""
    out = asked.out / task / "evaluation"
    if not (out / "results.md").is_file():
        named = tuple(f"{name}={folder}" for name, folder in backbones.items())
        moce.evaluate(
            SUITE,
            root=asked.data,
            backbones=named,
            tasks=(task,),
            out=out,
            overwrite=True,
            seed=asked.seed,
            **RUNTIME,
        )
    about = {"study": "distill", "variant": f"{asked.steps} steps", "seed": asked.seed}
    return [{**about, **row} for row in evaluation_rows(out)]


def _costs(folders: dict[str, Path], asked: Any) -> list[dict[str, Any]]:
    """Seconds and last loss of every student's training."""
    about = {"study": "distill", "variant": f"{asked.steps} steps", "seed": asked.seed}
    return [
        {**about, "backbone": name, "measure": measure, "value": value}
        for name, folder in folders.items()
        for measure, value in (
            ("train_seconds", round(sum_seconds(read_timings(folder)), 1)),
            ("loss", round(read_metrics(folder)[-1]["loss"], 4)),
        )
    ]


if __name__ == "__main__":
    main()
