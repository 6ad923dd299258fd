"""The typed functions: help, the stub that editors read, and how arguments are bound."""

from __future__ import annotations

import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
from test_config_cli import flat
from tools.build_stub import STUB, stub

import moce
from moce.commands.registry import COMMANDS
from moce.errors import MoceError


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_function_shows_every_setting(command: str) -> None:
    shown = pydoc.render_doc(getattr(moce, command), renderer=pydoc.plaintext)
    for name, field in COMMANDS[command].settings.model_fields.items():
        assert flat(field.description) in flat(shown), name
        assert f"{name}: " in shown.splitlines()[2]
    assert shown.splitlines()[2].endswith("Result")


def test_the_stub_is_current() -> None:
    assert STUB.read_text() == stub(), "run: python -m tools.build_stub"


def test_type_checkers_know_settings_and_results(tmp_path: Path) -> None:
    """mypy reads only moce and its commands: following all other imports takes ten times as long."""
    program, config = tmp_path / "use.py", tmp_path / "mypy.ini"
    config.write_text(
        "[mypy]\nfollow_imports = skip\n[mypy-moce,moce.commands.*]\nfollow_imports = silent\n"
    )
    program.write_text(
        "import moce\n"
        "loss: float = moce.pretrain('x', out='o', epochs=3, device='cpu').loss\n"
        "moce.report('a', 'b', max_images=3)\n"
        "moce.pretrain('x', out='o', epoch=3)\n"
        "moce.pretrain('x', out='o', device='tpu')\n"
        "moce.cluster('x', out='o')\n"
        "word: str = moce.pretrain('x', out='o').loss\n"
    )
    command = [sys.executable, "-m", "mypy", "--no-error-summary", f"--config-file={config}",
               f"--cache-dir={tmp_path}", str(program)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [int(line.split(":")[1]) for line in lines] == [4, 5, 6, 7], done.stdout + done.stderr


def test_functions_bind_their_arguments_as_python_does() -> None:
    with pytest.raises(TypeError, match="multiple values for argument 'data'"):
        moce.pretrain("x", data="y")
    with pytest.raises(TypeError, match="too many positional"):
        moce.pretrain("x", "y")
    with pytest.raises(MoceError, match="'data' is missing"):
        moce.pretrain(out="o")
