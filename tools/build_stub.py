"""Write src/moce/__init__.pyi: the functions of moce with every setting, for editors and type checkers.

    python -m tools.build_stub

Made from the settings classes in moce/config, which stay the one definition.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import indent

import moce
from moce.commands.registry import COMMANDS, Command
from moce.config.signature import docstring_of

STUB = Path(moce.__file__).with_suffix(".pyi")
HEAD = '''"""Made by tools/build_stub.py from the settings classes in moce/config; do not edit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

{imports}
from moce.customization.bank import Bank
from moce.errors import MoceError as MoceError

Data = str | Path | Sequence[str | Path]  # a DATA argument, or several sources

__version__: str
__all__: list[str]

def load(run: str | Path) -> Bank:
    """Load a `moce train` run, ready to `.select` and `.customize`."""
'''


def stub() -> str:
    """The text of the stub."""
    commands = sorted(COMMANDS.values(), key=lambda command: command.name)
    imports = [
        f"from moce.commands.{c.name} import {c.signature.return_annotation}" for c in commands
    ]
    text = HEAD.format(imports="\n".join(imports)) + "\n".join(map(definition, commands))
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(STUB), "-"]
    return subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout


def definition(command: Command) -> str:
    """A function of the stub."""
    document = indent(docstring_of(command.settings, command.signature), "    ").lstrip()
    return f'def {command.name}{command.signature}:\n    """{document}\n    """\n'


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
