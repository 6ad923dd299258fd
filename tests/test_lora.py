"""Fine-tuning by low-rank adapters: what trains, what is written, what resumes, what is refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from builders import RUNTIME, batch
from commands import World, one_line, run_command
from launched import moce_words, torchrun
from peft import PeftModel
from torch.testing import assert_close

import moce
from moce.errors import Interrupted
from moce.evaluation.finetune import FinetuneObjective
from moce.runs.files import read_tensors
from moce.runs.model import read_config, read_metrics

SETTINGS = {
    **RUNTIME,
    "lora": 2,
    "batch_size": 8,
    "epochs": 3,
    "mixup": 0,
    "cutmix": 0,
    "log_every": 1,
    "base_lr": 5e-2,
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def finetune(runs, out: Path, **changes: object) -> Path:
    return moce.finetune(runs.backbone, runs.task, out=out, **{**SETTINGS, **changes}).run


@pytest.fixture(scope="module")
def adapted(runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(runs, tmp_path_factory.mktemp("lora") / "run")


def by_peft(backbone: Path, adapter: Path, classes: int) -> PeftModel:
    base = timm.create_model(
        f"local-dir:{backbone}",
        pretrained=True,
        num_classes=classes,
        global_pool="avg",
        fc_norm=True,
    )
    return PeftModel.from_pretrained(base, str(adapter)).eval()


def test_timm_loads_the_merged_model_and_peft_the_adapter(runs, adapted: Path) -> None:
    images, _, _ = batch(4)
    merged = timm.create_model(f"local-dir:{adapted}", pretrained=True).eval()
    found = by_peft(runs.backbone, adapted / "adapter", 3)
    with torch.inference_mode():
        assert_close(found(images), merged(images), **CLOSE)
    plain = timm.create_model(f"local-dir:{runs.backbone}", pretrained=True, num_classes=3).eval()
    moved = (merged.forward_features(images) - plain.forward_features(images)).abs().max()
    assert moved > 1e-3  # or the adapters have learned nothing


def test_only_adapters_and_the_head_train(runs, adapted: Path) -> None:
    before, after = (
        read_tensors(folder / "model.safetensors") for folder in (runs.backbone, adapted)
    )
    moved = {n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])}
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert moved == {f"blocks.{block}.{name}.weight" for block in range(4) for name in names}
    for name in moved:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2
    saved = read_tensors(adapted / "adapter" / "adapter_model.safetensors")
    kinds = {name.split(".")[-2] for name in saved}
    assert kinds == {"lora_A", "lora_B", "head", "fc_norm"}
    assert len(saved) == 2 * len(moved) + 4
    recorded = read_config(adapted)
    assert (recorded["layer_decay"], recorded["base_lr"]) == (1.0, 5e-2)


def test_targets_and_scale_are_those_given(runs, tmp_path: Path) -> None:
    run = finetune(runs, tmp_path / "run", lora_targets=("attn",), lora_alpha=6, epochs=1)
    before, after = (read_tensors(folder / "model.safetensors") for folder in (runs.backbone, run))
    moved = {n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])}
    assert moved == {f"blocks.{b}.attn.{name}.weight" for b in range(4) for name in ("qkv", "proj")}
    adapter = read_tensors(run / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.blocks.2.attn.proj.lora"
    product = adapter[f"{prefix}_B.weight"] @ adapter[f"{prefix}_A.weight"]
    name = "blocks.2.attn.proj.weight"
    assert_close(after[name] - before[name], product * 6 / 2, **CLOSE)


def test_a_resumed_run_ends_with_the_same_bits(runs, tmp_path: Path, monkeypatch) -> None:
    asked = {"keep_best": True, "ema": 0.8, "save_every": 1, "drop_path": 0.1, "epochs": 2}
    finetune(runs, tmp_path / "whole", **asked)
    step, calls = FinetuneObjective.converged, []

    def stop(self: FinetuneObjective) -> bool:
        calls.append(self)
        if len(calls) == 3:
            raise Interrupted(2, tmp_path, "here")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneObjective, "converged", stop)
        with pytest.raises(Interrupted):
            finetune(runs, tmp_path / "cut", **asked)
    finetune(runs, tmp_path / "cut", **asked, resume=True)
    for name in ("metrics.jsonl", "model.safetensors", "adapter/adapter_model.safetensors"):
        whole, cut = ((tmp_path / run / name).read_bytes() for run in ("whole", "cut"))
        assert whole == cut, name


def test_the_score_is_the_merged_models(runs, adapted: Path, tmp_path: Path) -> None:
    row = json.loads((adapted / "rows.jsonl").read_text())
    moce.predict(adapted, f"{runs.task}/test", out=tmp_path / "predicted", **RUNTIME)
    table = (next((tmp_path / "predicted").glob("*.csv"))).read_text().splitlines()
    right = sum(line.split(",")[0].split("/")[0] == line.split(",")[1] for line in table[1:])
    assert right / (len(table) - 1) == pytest.approx(row["values"][0])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--freeze", 1], "--lora freezes the whole backbone: leave out --freeze"),
        (["--task", "segment"], "task segment does not use it"),
        (["--lora", 0], "greater than or equal to 1"),
    ],
)
def test_what_does_not_go_with_adapters_is_refused(runs, tmp_path, capsys, flags, expected) -> None:
    world = World(runs, tmp_path)
    assert run_command(world.finetune("--lora", 2, *flags)) != 0
    assert expected in one_line(capsys.readouterr().err)
    assert not world.out.exists()


def test_settings_of_adapters_need_adapters(runs, tmp_path: Path, capsys) -> None:
    world = World(runs, tmp_path)
    assert run_command(world.finetune("--lora-alpha", 2, "--lora-targets", "mlp")) != 0
    line = one_line(capsys.readouterr().err)
    assert "leave out --lora-alpha and --lora-targets: only --lora uses them" in line


def test_without_peft_one_line_names_the_extra(runs, tmp_path, capsys, monkeypatch) -> None:
    hidden = lambda name: None if name == "peft" else find_spec(name)  # noqa: E731
    monkeypatch.setattr("moce.training.lora.find_spec", hidden)
    world = World(runs, tmp_path)
    assert run_command(world.finetune("--lora", 2)) != 0
    assert "pip install 'moce[lora]'" in one_line(capsys.readouterr().err)
    assert not world.out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_the_same_adapters(strategy: str, runs, tmp_path: Path) -> None:
    asked = {**SETTINGS, "drop_path": 0.0, "steps": 4, "epochs": 100, "strategy": strategy}
    asked = {k: v for k, v in asked.items() if k != "epochs"}
    moce.finetune(runs.backbone, runs.task, out=tmp_path / "one", **asked)
    settings = {**asked, "backbone": runs.backbone, "data": runs.task, "out": tmp_path / "two"}
    done = torchrun(*moce_words("finetune", settings))
    _, errors = done.communicate(timeout=600)
    assert done.returncode == 0, errors
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = (read_tensors(tmp_path / run / name) for run in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            assert torch.allclose(one[key], two[key], atol=1e-4, rtol=1e-3), key
    losses = [[row["loss"] for row in read_metrics(tmp_path / run)] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
