"""Settings and the command line: help, recipes, and mistakes reported in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import yaml
from builders import PRETRAIN, RUNTIME, TINY_ARGS, copy_run
from commands import QUIET, run_command

import moce
from moce import config
from moce.commands.registry import COMMANDS
from moce.config.facts import facts_of
from moce.config.load import parse
from moce.config.usage import check_used
from moce.errors import MoceError
from moce.runs.folder import check_folder, open_folder

TINY = [*commands.TINY, *QUIET]


# --- settings ---------------------------------------------------------------------------------------


def test_unknown_setting_suggests_the_nearest() -> None:
    with pytest.raises(
        MoceError, match=r"unknown setting 'num_expert' \(did you mean 'num_experts'"
    ):
        moce.train("x", mae="m", clusters="c", out="o", num_expert=3)


def test_a_value_of_two_types_is_one_mistake() -> None:
    with pytest.raises(MoceError) as refusal:
        moce.finetune("b", "d", out="o", freeze=-1)
    expected = "setting 'freeze': input should be 'backbone' or greater than or equal to 0 (got -1)"
    assert str(refusal.value) == expected


def test_a_list_where_a_path_belongs() -> None:
    with pytest.raises(MoceError, match=r"^setting 'runs.0': must be a path \(got \['a', 'b'\]\)$"):
        moce.report(["a", "b"])


def test_arguments_may_follow_flags(capsys) -> None:
    words = ["finetune", "--steps", "1", "no-such-mae", "--workers", "0", "no-such-data"]
    assert run_command([*words, "more"]) == 2
    assert "unknown argument more" in capsys.readouterr().err
    assert run_command(words) == 2
    assert "error: --out is missing" in capsys.readouterr().err  # and neither BACKBONE nor DATA


def test_all_mistakes_come_in_one_message() -> None:
    with pytest.raises(MoceError) as refusal:
        moce.pretrain("x", epochs="many", mask_ratio=1.5, batch_size=0, color=3)
    message = str(refusal.value)
    for name in ("epochs", "mask_ratio", "batch_size", "color", "out"):
        assert f"'{name}'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "mistake",
    [
        {"batch_size": 0},
        {"batch_size": -4},
        {"batch_size": 2.5},
        {"epochs": 0},
        {"epochs": float("nan")},
        {"base_lr": float("inf")},
        {"mask_ratio": 0},
        {"mask_ratio": 1},
        {"warmup": 1.1},
        {"img_size": -8},
        {"micro_batch_size": 0},
        {"threads": 0},
        {"seed": -1},
        {"device": "tpu"},
        {"model_args": "depth"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(mistake: dict) -> None:
    with pytest.raises(MoceError, match=next(iter(mistake))):
        parse(config.PretrainSettings, {"data": "x", "out": "o", **mistake})


def test_settings_cannot_be_changed_and_survive_yaml() -> None:
    settings = parse(
        config.TrainSettings, {"data": "x", "mae": "m", "out": "o", "moe_blocks": [1, 3]}
    )
    with pytest.raises(ValueError):
        settings.seed = 3
    content = yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json")))
    assert parse(config.TrainSettings, content) == settings


def test_every_setting_has_a_description() -> None:
    for command in COMMANDS.values():
        for name, field in command.settings.model_fields.items():
            assert field.description, f"{command.name} {name}"


# --- help and import --------------------------------------------------------------------------------


def flat(text: str) -> str:
    """Without the line breaks and spaces that a narrow terminal makes."""
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_setting_and_gives_an_example(command: str, capsys) -> None:
    assert run_command([command, "--help"]) == 0
    shown = flat(capsys.readouterr().out)
    for name, field in COMMANDS[command].settings.model_fields.items():
        assert flat(field.description) in shown, name
        option = name if name in COMMANDS[command].positional else name.replace("_", "-")
        assert option in shown or option.upper() in shown
    assert flat("example: " + COMMANDS[command].example) in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_valid_commands(command: str) -> None:
    from moce.cli import build_parser, settings_of

    options = vars(build_parser().parse_args(COMMANDS[command].example.split()[1:]))
    options.pop("command")
    parse(COMMANDS[command].settings, settings_of(COMMANDS[command], options))


def test_help_lists_every_command(capsys) -> None:
    assert run_command(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    assert run_command([]) == 2


@pytest.mark.parametrize(
    "statement",
    [
        "import moce",
        "import moce.cli, moce.config, moce.commands.registry; moce.cli.build_parser()",
    ],
)
def test_importing_is_light(statement: str) -> None:
    heavy = (
        "{'torch', 'timm', 'sklearn', 'lightning_fabric', 'torchvision', 'matplotlib', 'pyarrow'}"
    )
    code = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_package_has_a_function_for_every_command() -> None:
    for command in COMMANDS:
        assert command in moce.__all__


# --- recipes ----------------------------------------------------------------------------------------


def test_recipe_gives_settings_and_flags_win(runs, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = {**PRETRAIN, "data": str(runs.data), "epochs": 5, "mask_ratio": 0.5}
    recipe.write_text(yaml.safe_dump(content))
    out = tmp_path / "run"
    assert run_command(["pretrain", "--config", recipe, "--out", out, "--epochs", "0.1"]) == 0
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert (resolved["epochs"], resolved["mask_ratio"]) == (0.1, 0.5)
    assert resolved["model_args"] == TINY_ARGS
    assert str(out) in capsys.readouterr().out


def test_written_config_is_a_recipe(runs, tmp_path: Path) -> None:
    recipe = runs.moce / "config.yaml"
    out = tmp_path / "again"
    assert run_command(["train", "--config", recipe, "--out", out, "--epochs", "0.1"]) == 0
    one, other = (yaml.safe_load((run / "config.yaml").read_text()) for run in (runs.moce, out))
    assert {k for k in one if one[k] != other[k]} == {"out", "epochs"}


def test_a_grid_of_rates_takes_the_place_of_a_recipes_rate(runs, tmp_path: Path) -> None:
    """As recipes/finetune_small.yaml says; the run's own config.yaml, with both, is a recipe again."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{base_lr: 7, batch_size: 16, steps: 1, rand_augment: ''}")
    words = ["finetune", runs.backbone, runs.task, *QUIET, "--config"]
    out, again = tmp_path / "run", tmp_path / "again"
    assert run_command([*words, recipe, "--lr-grid", "1e-3", "--out", out]) == 0
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert (resolved["base_lr"], resolved["batch_size"]) == (1e-3, 16)
    assert run_command([*words, out / "config.yaml", "--out", again]) == 0


def test_flags_of_lists_mappings_and_switches(runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", runs.data, "--mae", runs.mae, "--clusters", runs.clusters, "--out", out,
             "--num-experts", 2, "--moe-blocks", "3,0", "--no-gate-noise", "--epochs", "0.1",
             "--shared-gate", *QUIET]  # fmt: skip
    assert run_command(words) == 0
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["moe_blocks"] == [3, 0]
    assert (resolved["gate_noise"], resolved["shared_gate"]) == (False, True)
    assert json.loads((out / "model.json").read_text())["spec"]["blocks"] == [0, 3]


def test_json_output_is_json(runs, tmp_path: Path, capsys) -> None:
    words = ["customize", runs.moce, runs.task, "--out", tmp_path / "o", "--json", *QUIET]
    assert run_command(words) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["strategy"] in ("route", "merge") and content["folder"] == str(tmp_path / "o")
    assert run_command(["probe", tmp_path / "o", runs.task, "--json", *QUIET]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["mean"] <= 1


# --- mistakes ---------------------------------------------------------------------------------------


def one_line(capsys) -> str:
    """The error of the last command, which must be one line without a traceback."""
    return commands.one_line(capsys.readouterr().err)


def test_full_output_folder_names_the_two_ways_on(runs, tmp_path: Path, capsys) -> None:
    run = copy_run(runs.mae, tmp_path / "run")
    before = (run / "model.json").read_bytes()
    words = ["pretrain", runs.data, "--out", run, *TINY]
    assert run_command(words) == 2
    message = one_line(capsys)
    assert "--overwrite" in message and "--resume" in message
    assert (run / "model.json").read_bytes() == before
    assert run_command([*words, "--overwrite"]) == 0
    assert (run / "model.json").read_bytes() != before


def test_advice_names_only_flags_that_the_command_has(runs, capsys) -> None:
    """cluster can resume, export cannot."""
    for command, words in (
        ("cluster", [runs.data, "--mae", runs.mae, "--num-clusters", 4, *QUIET]),
        ("export", [runs.moce, "--strategy", "generalist"]),
    ):
        assert run_command([command, *words, "--out", runs.data]) == 2
        message = one_line(capsys)
        assert "--overwrite" in message and ("--resume" in message) == (command == "cluster")


def test_overwrite_never_empties_a_folder_of_other_things(runs, tmp_path: Path, capsys) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert run_command(["pretrain", runs.data, "--out", tmp_path, *TINY, "--overwrite"]) == 2
    assert "files that moce did not write" in one_line(capsys)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_overwriting_ones_own_input_is_refused(runs, tmp_path: Path, capsys) -> None:
    """The run that is read must not be emptied before or after it has been read."""
    run = copy_run(runs.mae, tmp_path / "run")
    words = ["cluster", runs.data, "--mae", run, "--out", run, "--overwrite", "--num-clusters", 4]
    assert run_command([*words, *QUIET]) == 2
    assert json.loads((run / "model.json").read_text())["kind"] == "mae"


def test_functions_take_what_the_command_line_takes(runs, tmp_path: Path) -> None:
    result = moce.probe(runs.backbone, runs.task, kind="knn", draws=2, num_labels=9, **RUNTIME)
    assert len(result.values) == 2 and result.labels == 9
    assert moce.probe(runs.mae, str(runs.task), **RUNTIME).protocol == "linear"


def test_overwrite_spares_folders_that_merely_hold_a_known_name(runs, tmp_path: Path) -> None:
    """A config.json in somebody's project does not make the folder above it a run."""
    (tmp_path / "home" / "proj").mkdir(parents=True)
    (tmp_path / "home" / "proj" / "config.json").write_text("{}")
    (tmp_path / "home" / "thesis").mkdir()
    (tmp_path / "home" / "thesis" / "important.txt").write_text("mine")
    words = ["customize", runs.moce, runs.task, "--out", tmp_path / "home", "--overwrite", *QUIET]
    assert run_command(words) == 2
    assert (tmp_path / "home" / "thesis" / "important.txt").read_text() == "mine"


def test_overwrite_spares_foreign_files_in_a_run(runs, tmp_path: Path) -> None:
    run = copy_run(runs.backbone, tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    words = ["customize", runs.moce, runs.task, "--out", run, "--overwrite", *QUIET]
    assert run_command(words) == 2
    assert (run / "notes.txt").read_text() == "mine"


def test_bare_resume_keeps_the_settings_of_the_run(runs, tmp_path: Path) -> None:
    run = copy_run(runs.mae, tmp_path / "run")
    assert run_command(["pretrain", runs.data, "--out", run, "--resume"]) == 0
    assert run_command(["pretrain", runs.data, "--out", run, "--resume", "--epochs", 3]) == 2


# --- facts of settings ------------------------------------------------------------------------------


def test_facts_name_settings_that_exist() -> None:
    for kind in config.settings_classes():
        for facts in facts_of(kind).values():
            others = {*facts.get("used_with", ()), *filter(None, [facts.get("replaces")])}
            assert others <= kind.model_fields.keys(), kind


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clusters": "c"}, None),
        ({}, "add --clusters: method moce needs it"),
        ({"method": "subset", "clusters": "c"}, "add --task: method subset needs it"),
        ({"clusters": "c", "gate_init_std": 0.1}, "gate_init centroids does not use it"),
        ({"method": "token_moe", "gate_init_std": 0.1}, None),
        ({"method": "sdr", "clusters": "c", "gate_init_std": 0.1}, "method sdr does not use it"),
        ({"method": "mae", "moe_blocks": (1,), "shared_gate": True}, "does not use them"),
        ({"method": "mae", "num_experts": 8}, None),  # the default
    ],
    ids=str,
)
def test_settings_without_effect_are_refused(values: dict, message: str | None) -> None:
    settings = parse(config.TrainSettings, {"data": "x", "mae": "m", "out": "o", **values})
    if message is None:
        check_used(settings, settings)
    else:
        with pytest.raises(MoceError, match=message):
            check_used(settings, settings)


def test_what_safetensors_leaves_behind_is_removed_from_runs_alone(runs, tmp_path: Path) -> None:
    run, foreign = copy_run(runs.mae, tmp_path / "run"), tmp_path / "foreign"
    left = [folder / ".tmpaB3dE9" for folder in (run, run / "state", foreign)]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    check_folder(run, overwrite=True)
    open_folder(run, lambda: None, keep=True)
    assert [path.exists() for path in left] == [False, False, True]
    with pytest.raises(MoceError, match="is not empty"):
        check_folder(foreign)


def test_overwrite_takes_runs_within_a_run_and_nothing_else(tmp_path: Path) -> None:
    """As headroom and evaluate leave them."""
    for name in ("config.yaml", "all/metrics.jsonl", "all/timings.jsonl", "all/state/x.safetensors",
                 "backbones/a/task/selection.json", "backbones/a/task/README.md"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    check_folder(tmp_path, overwrite=True)
    for name in ("all/notes.txt", "mine/README.md", "backbones/a/README.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(MoceError, match="did not write"):
            check_folder(tmp_path, overwrite=True)
        path.unlink()
