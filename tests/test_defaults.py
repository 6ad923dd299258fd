"""What a run chooses where nothing is given, what it says before it starts, and how long things take."""

from __future__ import annotations

import io
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from builders import PRETRAIN, RUNTIME, tiny_encoder
from commands import run_command
from experiments.rates import run as rates
from huggingface_hub import constants
from rich.console import Console
from safetensors.torch import load_file
from torch.testing import assert_close

import moce
from moce.cli import build_parser, settings_of
from moce.commands import pretrain
from moce.commands.registry import COMMANDS
from moce.commands.setup import training_images
from moce.config import PretrainSettings, TrainSettings
from moce.config.load import parse
from moce.data.readers import folder
from moce.data.readers.left_out import LeftOut
from moce.data.sample_sizes import count_and_side
from moce.errors import MoceError
from moce.runs.files import read_lines
from moce.runtime import hub, progress
from moce.runtime.progress import duration, meter
from moce.training import announce
from moce.training.defaults import batch_for, choose_model, choose_training, default_lr, rate_for

SMALL_DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def asked(**given) -> PretrainSettings:
    return PretrainSettings(data="photos", out=Path("out"), **given)


# --- model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "side", "accelerated", "model", "size", "patch"),
    [
        (444, 480, False, "vit_tiny_patch16_224", None, None),
        (444, 480, True, "vit_small_patch16_224", None, None),
        (1_281_167, 375, True, "vit_base_patch16_224", None, None),
        (5_100, 32, False, "vit_tiny_patch16_224", 32, 4),
        (60_000, 28, True, "vit_base_patch16_224", 32, 4),
        (5_000, 64, True, "vit_small_patch16_224", 64, 8),
        (5_000, 96, False, "vit_tiny_patch16_224", 96, 8),
    ],
)
def test_the_model_fits_images_and_device(count, side, accelerated, model, size, patch) -> None:
    chosen = choose_model(asked(), count, side, accelerated)
    assert chosen["model"] == model
    assert chosen.get("img_size") == size
    assert chosen.get("model_args", {}).get("patch_size") == patch


def test_what_is_given_of_a_model_stays() -> None:
    chosen = choose_model(asked(decoder_dim=96, img_size=200), 444, 480, False)
    assert "decoder_dim" not in chosen and chosen["decoder_depth"] == 2
    assert chosen["img_size"] == 200 and 200 % chosen["model_args"]["patch_size"] == 0
    channels = choose_model(asked(model_args={"in_chans": 4}), 444, 32, False)
    assert channels["model_args"] == {"in_chans": 4, "patch_size": 4}
    shaped = choose_model(asked(model_args={"embed_dim": 384}), 444, 480, False)
    assert shaped == {"model": "vit_base_patch16_224"}


def test_count_and_size_of_images(runs, tmp_path: Path) -> None:
    assert count_and_side("demo:pretrain") == (5_100, 32)
    np.save(tmp_path / "a.npy", np.zeros((7, 20, 30, 3), np.uint8))
    assert count_and_side(str(tmp_path / "a.npy")) == (7, 20)
    moce.pack(tmp_path / "a.npy", out=tmp_path / "a.moce", size="24x40")
    assert count_and_side(str(tmp_path / "a.moce")) == (7, 24)
    moce.pack(runs.task, out=tmp_path / "task.moce", size=16)
    learned = len(list((runs.task / "train").rglob("*.png")))
    for name in (runs.task, tmp_path / "task.moce"):  # no model learns from test images
        assert count_and_side(str(name))[0] == learned
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no image")
    with pytest.raises(MoceError, match="none of 1 images"):
        count_and_side(str(tmp_path / "broken"))


def test_a_folder_is_listed_once(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model is chosen by the images."""
    times: list[Path] = []
    listing = folder._files

    def counted(root: Path, left_out: LeftOut) -> list[str]:
        times.append(root)
        return listing(root, left_out)

    monkeypatch.setattr(folder, "_files", counted)
    settings = PretrainSettings(data=str(runs.data), out=tmp_path / "run")
    chosen, samples = pretrain._with_model(settings, torch.device("cpu"))
    assert chosen.model is not None and samples is not None
    vit = tiny_encoder().build()
    images = training_images(chosen, chosen.data, vit, samples)
    assert times == [runs.data]
    assert images.ids == training_images(chosen, chosen.data, vit).ids


# --- length, batch, rate --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "parameters", "accelerated", "epochs", "batch", "rate"),
    [
        (444, 5.5e6, False, 200, 32, 4e-3),
        (5_100, 5.5e6, False, 39, 256, 4e-3),
        (1_000_000, 5.5e6, False, 5, 256, 4e-3),
        (20_000, 22e6, True, 400, 256, 1e-3),
        (1_281_167, 86e6, True, 100, 256, 1.5e-4),
    ],
)
def test_length_batch_and_rate(count, parameters, accelerated, epochs, batch, rate) -> None:
    chosen = choose_training(asked(), count, int(parameters), accelerated)
    assert chosen == {"epochs": epochs, "batch_size": batch, "base_lr": rate}


def test_given_settings_are_not_chosen() -> None:
    given = asked(steps=7, batch_size=512, base_lr=1e-5)
    assert choose_training(given, 444, 5_000_000, False) == {}


def test_training_on_from_weights_is_shorter_and_slower(runs) -> None:
    fresh = choose_training(asked(), 5_100, 5_000_000, False)
    for weights, rate in (
        (runs.mae, PRETRAIN["base_lr"] / 2),
        ("vit_base_patch16_224.mae", 7.5e-5),
    ):
        chosen = choose_training(asked(), 5_100, 5_000_000, False, default_lr(weights))
        assert chosen["base_lr"] == rate and chosen["epochs"] < fresh["epochs"] / 3


@pytest.mark.parametrize(
    ("parameters", "rate", "guess"),
    [
        (7e5, 4e-3, None),
        (5.5e6, 4e-3, "extrapolated"),
        (22e6, 1e-3, "interpolated"),
        (86e6, 1.5e-4, None),
    ],
)
def test_a_rate_that_was_not_measured_says_so(parameters: float, rate: float, guess: str) -> None:
    found, told = rate_for(int(parameters))
    assert found == rate
    assert told is None if guess is None else guess in told


@pytest.mark.slow
def test_the_study_of_rates_keeps_a_row_for_each(tmp_path: Path, monkeypatch) -> None:
    results = tmp_path / "rates.jsonl"
    words = ["--out", tmp_path, "--results", results, "--steps", 1, "--rates", "2e-3", "4e-3"]
    words += ["--models", "vit_tiny_patch16_224"]
    monkeypatch.setattr(sys, "argv", ["rates", *map(str, words)])
    rates.main()
    rows = read_lines(results)
    assert [row["base_lr"] for row in rows] == [2e-3, 4e-3]
    assert rows[0]["values"] == rows[1]["values"]  # the first step's loss comes before its rate
    assert rows[0]["values"][0] > 0.5


@pytest.mark.parametrize(("count", "size"), [(10, 16), (300, 32), (2_047, 128), (2_048, 256)])
def test_a_batch_leaves_steps(count: int, size: int) -> None:
    assert batch_for(count) == size


def test_a_bare_run_records_and_tells_what_it_chose(runs, tmp_path: Path, capsys) -> None:
    out = tmp_path / "bare"
    words = ["pretrain", "demo:digits", "--out", out, "--steps", 1, "--device", "cpu"]
    assert run_command([*words, "--threads", 1]) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["model"], config["img_size"]) == ("vit_tiny_patch16_224", 32)
    assert (config["batch_size"], config["base_lr"], config["epochs"]) == (32, 4e-3, None)
    told = capsys.readouterr().err
    assert "pretrain: vit_tiny_patch16_224, 5.79 M parameters, on 300 images of 32x32, cpu" in told
    assert "1 steps of 32 images (0.107 epochs), rate 0.0005 (base_lr 0.004)" in told
    assert f"writes {out}" in told
    assert "chosen for these images and this device: --base-lr, --batch-size" in told
    assert "base_lr 0.004 is extrapolated from encoders of up to 1 M parameters" in told
    values = {"data": "demo:digits", "mae": out, "clusters": tmp_path / "no", "out": "x"}
    assert TrainSettings(**values).base_lr is None


def test_a_large_batch_of_few_images_is_told(runs, tmp_path: Path, capsys) -> None:
    words = {**PRETRAIN, "batch_size": 24}
    moce.pretrain(runs.data, out=tmp_path / "a", steps=1, **words)
    count = sum(path.is_file() for path in runs.data.rglob("*"))
    assert f"a batch of 24 leaves {count / 24:.2g} steps per pass" in capsys.readouterr().err


def test_experts_continue_with_half_the_rate(runs, tmp_path: Path) -> None:
    out = tmp_path / "moce"
    given = {**RUNTIME, "num_experts": 2, "steps": 1}
    moce.train(runs.data, mae=runs.mae, clusters=runs.clusters, out=out, **given)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["base_lr"] == PRETRAIN["base_lr"] / 2


def test_measuring_the_time_leaves_no_trace(
    runs, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str) -> dict[str, torch.Tensor]:
        given = {**RUNTIME, "num_experts": 2, "steps": 2, "batch_size": 16}
        clusters, out = runs.clusters, tmp_path / name
        moce.train(runs.data, mae=runs.mae, clusters=clusters, out=out, **given)
        return load_file(out / "model.safetensors")

    plain = trained("plain")
    assert "takes about" not in capsys.readouterr().err
    monkeypatch.setattr(announce, "WORTH_MEASURING", 0)
    monkeypatch.setattr(announce, "LONG", 0.0)
    assert_close(trained("measured"), plain, rtol=0, atol=0)
    told = capsys.readouterr().err
    assert "takes about" in told and "for a first look: --steps" in told


# --- recipes and hub ------------------------------------------------------------------------------

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_a_command_that_takes_it(path: Path) -> None:
    """Its first command names it, and the command's settings accept both."""
    text = re.sub(r"\\\n# *", "", path.read_text())  # lines that go on
    words = next(line for line in text.splitlines() if " --config " in line).split()
    words = words[words.index("moce") + 1 :]
    assert words[-1] == f"recipes/{path.name}" and words[-2] == "--config"
    options = vars(build_parser().parse_args(words)) | {"config": path}
    command = COMMANDS[options.pop("command")]
    parse(command.settings, settings_of(command, options))


def test_without_a_hub_its_weights_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    for name in hub.PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with hub.cache_if_unreachable() as online:
        assert not online and constants.is_offline_mode()
    assert not constants.is_offline_mode()
    with pytest.raises(MoceError, match="vit_tiny_patch16_224: the hub does not answer"):
        moce.pretrain("demo:digits", out=tmp_path / "x", init="vit_tiny_patch16_224", **RUNTIME)
    assert not (tmp_path / "x").exists()


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (12_000, "3 h 20 min"),
        (24 * 3600 - 1, "1 d 0 h"),
        ((3 * 24 + 7) * 3600, "3 d 7 h"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_narrow_terminal_shows_count_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long note is cut off, and nothing else; a second bar inside the first is no error."""
    screen = io.StringIO()
    narrow = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(progress, "console", narrow)
    with meter("pretrain", 4_000) as bar:
        bar.advance("loss 0.5123, " + "k-NN 41.2 %, linear 55.3 %, " * 4)
        with meter("features", 3) as inner:
            inner.advance()
        bar.advance()
    last = [line for line in re.split(r"[\r\n]", screen.getvalue()) if "2/4000" in line][-1]
    assert "pretrain" in last and "left" in last and "loss 0.5123, " in last and "…" in last


def test_a_log_without_terminal_has_lines_with_the_time_left(
    capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with meter("train", 28_442) as shown:
        for step in range(3):
            shown.advance(f"loss 0.{step}")
    assert capsys.readouterr().err.splitlines() == ["train 2/28442, 3 d 7 h left, loss 0.1"]
