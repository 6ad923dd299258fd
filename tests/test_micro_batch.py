"""Micro-batches that find themselves, with memory that runs out where a test says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import PRETRAIN, demo_images, tiny_mae, tiny_spec
from commands import World, one_line, run_command

import moce
from moce.config import PretrainSettings
from moce.errors import OutOfMemory
from moce.models.mae import MAE
from moce.runs.files import read_tensors
from moce.runs.model import read_config
from moce.training.micro_batch import fits, most_that_fit, settle_micro_batch
from moce.training.objectives import MAEObjective

CPU = torch.device("cpu")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch):
    """A function that sets how many images a forward pass of an MAE has memory for.

    This machine may have no GPU: the error is torch's own, raised in a real step after its forward pass.
    """
    forward = MAE.forward

    def limit(most: int) -> list[int]:
        sizes: list[int] = []

        def limited(self, images, *args, **options):
            output = forward(self, images, *args, **options)
            sizes.append(len(images))
            if len(images) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return output

        monkeypatch.setattr(MAE, "forward", limited)
        return sizes

    monkeypatch.setattr("moce.training.micro_batch.TRIED_ON", {"cpu"})
    return limit


@pytest.mark.parametrize("count", [1, 2, 7, 32, 100])
def test_the_most_of_equal_passes_is_found_by_few_trials(count: int) -> None:
    def found_and_tried(room: int) -> tuple[int | None, list[int]]:
        tried: list[int] = []
        return most_that_fit(count, lambda size: tried.append(size) or size <= room), tried

    for room in range(1, count + 2):
        found, tried = found_and_tried(room)
        possible = {-(-count // passes) for passes in range(1, count + 1)}
        assert found == max(size for size in possible if size <= room)
        assert len(tried) <= 2 * count.bit_length() + 1
    assert most_that_fit(count, lambda size: False) is None


def objective_of(out: Path, **changes: object) -> tuple[MAEObjective, PretrainSettings]:
    given = {"data": "d", "out": out, **PRETRAIN, "epochs": 1, **changes}
    settings = PretrainSettings(**given)
    spec, mae = tiny_spec(), tiny_mae()
    return MAEObjective("pretrain", mae, spec.encoder, demo_images(), settings), settings


@pytest.mark.slow
def test_trials_leave_weights_buffers_and_random_numbers_untouched(room, tmp_path: Path) -> None:
    objective, settings = objective_of(tmp_path)
    objective.model.norm = torch.nn.BatchNorm2d(3)  # a student's, say
    forward = objective.loss
    objective.loss = lambda model, batch, step: (
        model.norm(batch.pixels.float()),
        torch.rand(3),
        forward(model, batch, step),
    )[2]
    before = {name: value.clone() for name, value in objective.model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    room(12)
    for count, expected in ((32, False), (12, True), (13, False)):
        assert fits(objective, settings, CPU, count) == expected
        after = objective.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(weight.grad is None for weight in objective.model.parameters())


def test_an_error_that_is_not_about_memory_is_not_taken_for_one(room, tmp_path: Path) -> None:
    objective, settings = objective_of(tmp_path)
    objective.loss = lambda model, batch, step: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fits(objective, settings, CPU, 2)


@pytest.mark.slow
def test_a_run_records_the_number_and_is_that_of_the_number(runs, tmp_path, room, capsys) -> None:
    sizes = room(12)
    asked = {**PRETRAIN, "steps": 3, "save_every": 1}
    moce.pretrain(runs.data, out=tmp_path / "auto", **asked)
    assert "--micro-batch-size 11: 3 passes for each batch" in capsys.readouterr().err
    assert read_config(tmp_path / "auto")["micro_batch_size"] == 11
    assert max(sizes[-9:]) == 11  # of training, after the trials
    moce.pretrain(runs.data, out=tmp_path / "given", micro_batch_size=11, **asked)
    one, other = (read_tensors(tmp_path / name / "model.safetensors") for name in ("auto", "given"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_resumed_run_takes_the_recorded_number(runs, tmp_path, room) -> None:
    room(12)
    asked = {**PRETRAIN, "steps": 4, "save_every": 1}
    moce.pretrain(runs.data, out=tmp_path / "run", **asked)
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "model.json").unlink()
    newest = sorted((tmp_path / "run" / "state").glob("step_*"))[-1]
    newest.unlink()
    room(20)  # now 16 would fit
    asked |= {"micro_batch_size": "auto", "resume": True}
    moce.pretrain(runs.data, out=tmp_path / "run", **asked)
    assert read_config(tmp_path / "run")["micro_batch_size"] == 11
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole


def test_on_a_cpu_and_if_sharded_nothing_is_tried(tmp_path: Path) -> None:
    objective, settings = objective_of(tmp_path)
    objective.loss = None  # must not be called
    assert settle_micro_batch(objective, settings, CPU).micro_batch_size == 256
    given = settings.model_copy(update={"micro_batch_size": 7})
    assert settle_micro_batch(objective, given, CPU) is given


def test_running_out_while_training_names_the_number(runs, tmp_path, room, capsys) -> None:
    room(12)
    world = World(runs, tmp_path)
    assert run_command(world.pretrain(None, "--micro-batch-size", 16)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]  # after the run's header
    assert "out of memory with 16 images a pass: give --micro-batch-size 8" in line
    assert "or --grad-checkpointing" in line
    with pytest.raises(OutOfMemory, match="with 16 images"):
        moce.pretrain(runs.data, out=tmp_path / "api", micro_batch_size=16, steps=2, **PRETRAIN)


@pytest.mark.slow
def test_a_model_too_large_for_one_image_is_refused(runs, tmp_path, room, capsys) -> None:
    room(0)
    world = World(runs, tmp_path)
    assert run_command(world.pretrain()) == 2
    assert "out of memory with one image a pass" in one_line(capsys.readouterr().err)
