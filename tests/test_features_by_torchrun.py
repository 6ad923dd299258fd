"""embed, probe, evaluate and customize by two processes: the files of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from builders import RUNTIME, tiny_encoder, write_images
from launched import moce_lines, moce_words, torchrun

import moce.inference.features as features
from moce.commands.registry import COMMANDS
from moce.data.load import load_images
from moce.evaluation.results import read_rows
from moce.runs.files import read_lines, read_tensors
from moce.runs.model import SKIPPED

BATCH = 7  # images do not divide by it, nor its batches by two
UNREADABLE = ("first.png", "last.png")  # one in the share of either process


@pytest.mark.parametrize("processes", [1, 2, 3, 40])
def test_shared_batches_are_those_of_one_process(
    processes: int, runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; each process makes every so manieth batch."""
    spec = tiny_encoder()
    vit, images = spec.build(), load_images(str(runs.data), (16, 16))
    options = {"device": torch.device("cpu"), "batch_size": BATCH}
    whole = list(features.feature_batches(vit, spec, images, **options))
    monkeypatch.setattr(features, "world_size", lambda: processes)
    made = {
        r: list(
            features.feature_batches(vit, spec, images, share=slice(r, None, processes), **options)
        )
        for r in range(processes)
    }
    turns = iter(range(len(whole)))

    def gathered(values: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        turn = next(turns)
        parts = [made[r][turn] if turn < len(made[r]) else values[:0] for r in range(processes)]
        assert [len(part) for part in parts] == counts
        assert torch.equal(parts[0], values)  # this process is rank 0
        return parts

    monkeypatch.setattr(features, "all_gather_rows", gathered)
    shared = list(features.shared_feature_batches(vit, spec, images, **options))
    assert len(shared) == len(whole)
    assert all(torch.equal(*pair) for pair in zip(shared, whole, strict=True))


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Path]]:
    """By command, what one process and two wrote; all by one torchrun."""
    folder = tmp_path_factory.mktemp("features")
    data = write_images(folder / "data")
    for name in UNREADABLE:
        (data / name).write_text("no image")
    task = shutil.copytree(runs.task, folder / "task")
    next(task.rglob("*.png")).write_text("no image")
    suite = folder / "suite.yaml"
    tasks = [{"name": "shapes", "data": str(task), "labels": 12}]
    finetune = {"epochs": 2, "batch_size": 8, "rand_augment": "", "mixup": 0, "cutmix": 0}
    probe = {"solver": "lbfgs", "micro_batch_size": BATCH}
    content = {"name": "small", "draws": 2, "tasks": tasks, "probe": probe, "finetune": finetune}
    suite.write_text(yaml.safe_dump(content))
    common = {**RUNTIME, "max_skipped": 0.2}
    jobs = {
        "embed": {"backbone": str(runs.backbone), "data": str(data), "batch_size": BATCH},
        "probe": {"backbone": str(runs.backbone), "data": str(task), **probe, "num_labels": 12},
        "evaluate": {
            "suite": str(suite),
            "backbones": [f"mae={runs.mae}", f"moce={runs.moce}", f"best={runs.moce}@best_route"],
            "protocols": ["linear", "knn", "finetune"],
        },
        "customize": {"run": str(runs.moce), "images": str(task), "batch_size": BATCH},
    }
    found: dict[str, dict[int, Path]] = {}
    planned = []
    for command, settings in jobs.items():
        suffix = ".parquet" if command == "embed" else ""
        outs = {count: folder / f"{command}_{count}{suffix}" for count in (1, 2)}
        COMMANDS[command].run({**common, **settings, "out": str(outs[1])})
        planned.append(
            {"command": command, "settings": {**common, **settings, "out": str(outs[2])}}
        )
        found[command] = outs
    (folder / "jobs.json").write_text(json.dumps(planned))
    going = torchrun(Path(__file__).with_name("run_jobs.py"), folder / "jobs.json")
    _, output = going.communicate(timeout=1200)
    assert going.returncode == 0, output
    errors = [path.read_text() for path in folder.glob("*.error.*")]
    assert not errors, errors[0]
    assert not list(folder.glob(".*"))  # the files of pixels are gone
    return found


@pytest.mark.slow
def test_embed(made) -> None:
    """The same features to the bit, all unreadable images left out."""
    one, two = (pq.read_table(made["embed"][count]) for count in (1, 2))
    assert len(one) > BATCH and one.equals(two)
    assert not set(UNREADABLE) & set(two.column("id").to_pylist())


@pytest.mark.slow
def test_probe(made) -> None:
    one, two = (read_rows(made["probe"][count]) for count in (1, 2))
    assert one == two and len(one) == 1
    skipped = [read_lines(made["probe"][count] / SKIPPED) for count in (1, 2)]
    assert skipped[0] == skipped[1] and len(skipped[0]) == 1


@pytest.mark.slow
def test_evaluate(made) -> None:
    """Probes to the bit; fine-tuning sums its gradients in another order."""
    one, two = (read_rows(made["evaluate"][count]) for count in (1, 2))
    assert len(one) == len(two) == 8
    for row, again in zip(one, two, strict=True):
        differing = {name for name in row if row[name] != again[name]} - {"seconds"}
        tuned = {"values", "confusion"} if row["protocol"] == "finetune" else set()
        assert differing <= tuned, (row, again)
    names = [sorted(path.name for path in made["evaluate"][count].iterdir()) for count in (1, 2)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_customize(made) -> None:
    one, two = (made["customize"][count] for count in (1, 2))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert (one / "selection.json").read_text() == (two / "selection.json").read_text()
    tensors = [read_tensors(path / "model.safetensors") for path in (one, two)]
    assert all(torch.equal(values, tensors[1][name]) for name, values in tensors[0].items())


@pytest.mark.slow
def test_too_many_unreadable_images_are_refused_once(runs, tmp_path: Path) -> None:
    """Counted over both processes: each has one, which alone would be allowed."""
    data = write_images(tmp_path / "data", per_source=2)
    count = len(list(data.rglob("*.png")))
    for name in UNREADABLE:
        (data / name).write_text("no image")
    most = 1.5 / (count + 2)
    settings = {**RUNTIME, "backbone": runs.backbone, "data": data, "max_skipped": most}
    going = torchrun(*moce_words("embed", {**settings, "out": tmp_path / "out.parquet"}))
    _, output = going.communicate(timeout=600)
    assert going.returncode != 0
    assert len(moce_lines(output)) == 1, output
    assert f"2 of the {count + 2} images" in moce_lines(output)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out.parquet.yaml"]
