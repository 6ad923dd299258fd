"""What the project is handed out as: wheel, notebook, container, forms, completion, citation."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import nbclient
import nbformat
import pytest
import yaml
from commands import one_line, run_command

import moce
from moce.commands.registry import COMMANDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def shell(code: str, **more: object) -> subprocess.CompletedProcess[str]:
    words = ["bash", "--norc", "-c", code]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, **more)


# --- wheel ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(tmp_path: Path) -> None:
    """Built as `make dist` builds it, installed into an empty folder, imported from elsewhere."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    (archive,) = tmp_path.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("moce/", f"moce-{moce.__version__}.dist-info/")) for name in names)
    checked = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(archive)]
    subprocess.run(checked, check=True, capture_output=True, text=True)
    target = tmp_path / "site"
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", *install, str(wheel)], check=True, capture_output=True)
    code = (
        "import moce, moce.cli; print(moce.__file__);"
        "moce.cli.main(['embed', 'mae', 'demo:digits', '--out', 'x.parquet'])"
    )
    mae = tmp_path / "mae"
    tiny = "img_size=32, steps=1, decoder_dim=16, decoder_depth=1, decoder_heads=2, device='cpu'"
    args = "model_args={'patch_size': 8, 'embed_dim': 32, 'depth': 1, 'num_heads': 1}"
    code = f"import moce; moce.pretrain('demo:digits', out='{mae}', {tiny}, {args}); {code}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(target / "moce" / "__init__.py")
    assert (tmp_path / "x.parquet").stat().st_size > 0


def test_the_citation_has_the_version_and_the_license_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PROJECT["version"] == moce.__version__
    assert citation["license"] == PROJECT["license"]
    assert "arXiv:2402.05382" in str(citation["references"])


# --- notebook -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    shown = "".join(
        str(out.get("text", "")) for c in notebook.cells for out in c.get("outputs", ())
    )
    scores = [float(score) for score in re.findall(r"accuracy ([\d.]+) %", shown)]
    assert len(scores) == 2 and min(scores) > 15, shown  # ten classes: chance is 10


def test_the_stored_notebook_has_no_output() -> None:
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


# --- forms, workflow, container -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bug", "wish"])
def test_issue_forms_have_what_the_site_asks_for(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids)
    for part in form["body"]:
        assert part["type"] in {"textarea", "input", "dropdown", "checkboxes", "markdown"}
        assert part["attributes"]["label"]


def test_the_workflow_runs_the_gate_on_supported_versions() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert min(job["strategy"]["matrix"]["python"], key=lambda v: int(v[2:])) == lowest


def test_the_gate_runs_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    steps = re.findall(r"^make (.+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert steps
    for target in " ".join(steps).split():
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def docker_steps() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_container_copies_files_that_exist_and_are_not_ignored() -> None:
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    copied = [rest.split()[:-1] for word, rest in docker_steps() if word == "COPY"]
    files = [name for names in copied if not names[0].startswith("--") for name in names]
    assert {"pyproject.toml", "src"} <= set(files)
    for name in files:
        assert (ROOT / name).exists() and any(fnmatch(name, pattern) for pattern in kept), name
    build = [*PROJECT["license-files"][:1], PROJECT["readme"]]
    assert set(build) <= set(files), "the wheel needs them"


@pytest.mark.parametrize(
    ("device", "installs", "index"), [("cpu", 2, 1), ("cuda", 2, 0), ("tpu", 0, 0)]
)
def test_the_container_installs_what_its_device_needs(
    device: str, installs: int, index: int, tmp_path: Path
) -> None:
    """Its last RUN step in a real shell, with `pip` and `moce` that write down their arguments."""
    for name in ("pip", "moce"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    code = [rest for word, rest in docker_steps() if word == "RUN"][-1]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DEVICE": device, "CPU_INDEX": "INDEX"}
    done = subprocess.run(["sh", "-c", code], env=env, capture_output=True, text=True)
    calls = [shlex.split(line) for line in done.stdout.splitlines()]
    assert sum(call[:2] == ["pip", "install"] for call in calls) == installs
    assert sum("INDEX" in call for call in calls) == index
    assert (done.returncode == 0) == (device != "tpu")
    assert calls[-1:] == ([["moce", "doctor"]] if installs else [])


# --- completion -----------------------------------------------------------------------------------


def completions(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    given = " ".join(map(shlex.quote, words))
    code = (
        f"source {script}; COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; "
        'COMP_LINE="${COMP_WORDS[*]}"; _shtab_moce; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return shell(code).stdout.split()


def test_bash_completes_commands_flags_and_files(tmp_path: Path, capsys) -> None:
    assert run_command(["--print-completion", "bash"]) == 0
    script = tmp_path / "moce.bash"
    script.write_text(capsys.readouterr().out)
    assert shell(f"source {script}; complete -p moce").returncode == 0
    assert completions(script, "moce", "pret") == ["pretrain"]
    assert set(completions(script, "moce", "")) >= set(COMMANDS)
    assert completions(script, "moce", "cluster", "--num-c") == ["--num-clusters"]
    (tmp_path / "photos").mkdir()
    typed = str(tmp_path / "pho")
    assert completions(script, "moce", "cluster", typed) == [str(tmp_path / "photos")]
    assert completions(script, "moce", "cluster", "--mae", typed) == [str(tmp_path / "photos")]


def test_zsh_has_a_completion_and_other_words_are_refused(capsys) -> None:
    assert run_command(["--print-completion=zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef moce")
    assert run_command(["--print-completion", "dos"]) == 2
    assert "dos" in one_line(capsys.readouterr().err)
