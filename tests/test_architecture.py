"""Imports point one way, files stay short, and every command is where the registry says."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import moce
from moce.commands.registry import COMMANDS

SOURCE = Path(moce.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MOST_LINES = 400


def module_name(path: Path) -> str:
    parts = ("moce", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every module of moce that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            found |= {node.module or ""} | {f"{node.module}.{name.name}" for name in node.names}
    return {name for name in found if name == "moce" or name.startswith("moce.")}


IMPORTS = {module_name(path): imports_of(path) for path in FILES}


def importers(package: str) -> set[str]:
    """Modules outside a package that import it or something in it."""
    inside = (package, package + ".")
    return {
        name
        for name, imported in IMPORTS.items()
        if name != package and not name.startswith(inside[1])
        and any(other == package or other.startswith(inside[1]) for other in imported)
    }  # fmt: skip


def within(package: str) -> dict[str, set[str]]:
    return {name: found for name, found in IMPORTS.items() if f"{name}.".startswith(f"{package}.")}


# From the ground up: a folder may import those before it, never one behind it.
FLOORS = (
    "errors", "config", "runtime", "models", "runs", "data", "weights", "inference", "clustering",
    "training", "customization", "evaluation", "dense", "reporting", "explorer",
    "commands", "cli", "__main__",
)  # fmt: skip


def floor_of(module: str) -> int:
    """The floor of moce.FOLDER.…; the package itself, which only hands functions on, is on top."""
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 else len(FLOORS)


def test_every_folder_has_a_floor() -> None:
    found = {name.split(".")[1] for name in IMPORTS if "." in name}
    assert found == set(FLOORS)


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_no_import_runs_back_up(module: str) -> None:
    modules = {other for other in IMPORTS[module] if other in IMPORTS and other != "moce"}
    above = {other for other in modules if floor_of(other) > floor_of(module)}
    assert not above, f"{module} imports {above}"


def test_few_files_are_loose() -> None:
    loose = {path.name for path in SOURCE.glob("*.py")}
    assert loose == {"__init__.py", "__main__.py", "cli.py", "errors.py"}


def test_nothing_but_main_imports_the_command_line() -> None:
    assert importers("moce.cli") <= {"moce.__main__"}


def test_nothing_imports_a_command_but_the_package() -> None:
    """The package and the command line reach them through the registry."""
    assert importers("moce.commands") == {"moce", "moce.cli"}
    assert importers("moce.commands.registry") == {"moce", "moce.cli"}


def test_imports_have_no_cycle() -> None:
    modules = set(IMPORTS)
    graph = {name: (imported & modules) - {name, "moce"} for name, imported in IMPORTS.items()}
    graph.pop("moce")
    while graph:
        leaves = {name for name, imported in graph.items() if not imported & graph.keys()}
        assert leaves, f"cycle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_no_subpackage_takes_the_name_of_a_function() -> None:
    """Importing moce.NAME would put the package in the place of the function."""
    packages = {path.stem if path.is_file() else path.name for path in SOURCE.iterdir()}
    assert not packages & set(moce.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_short_and_say_what_they_are_for(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_run_function(command: str) -> None:
    assert COMMANDS[command].name == command
    assert callable(import_module(f"moce.commands.{command}").run)
    assert f"from moce.commands.{command} import run" in inspect.getsource(COMMANDS[command].work)
    assert set(COMMANDS[command].positional) <= COMMANDS[command].settings.model_fields.keys()


UNSAFE = SOURCE / "weights" / "unsafe_pickle.py"


def test_nothing_is_loaded_by_pickle() -> None:
    """torch.load reads tensors only, but in one file, for files that the user says he trusts."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = {ast.unparse(word) for word in node.keywords}
                assert "weights_only=True" in safe or path == UNSAFE, path
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in {"torch.save", "pickle.load", "pickle.loads"}, path


def test_only_convert_can_load_by_pickle() -> None:
    assert importers("moce.weights.unsafe_pickle") == {"moce.commands.convert"}
