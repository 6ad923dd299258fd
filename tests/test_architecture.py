"""Imports point one way, files stay short, and every verb is where the registry says."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

import moce
from moce.commands.registry import VERBS

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


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("moce.models", ["data", "training", "clustering", "customization", "transfer", "runs", "config",
                         "loading", "features", "verbs", "cli", "reporting"]),
        ("moce.data", ["training", "models", "clustering", "customization", "transfer", "verbs", "cli",
                       "reporting"]),
        ("moce.clustering", ["training", "customization", "transfer", "verbs", "cli", "reporting"]),
        ("moce.training", ["verbs", "cli", "customization", "transfer", "reporting"]),
        ("moce.customization", ["verbs", "cli", "transfer", "reporting"]),
        ("moce.weights", ["data", "training", "clustering", "customization", "transfer", "loading",
                          "features", "verbs", "cli", "reporting"]),
        ("moce.evaluation", ["verbs", "cli", "reporting"]),
        ("moce.config", ["models", "data", "training", "verbs", "cli", "reporting"]),
    ],
)  # fmt: skip
def test_imports_point_one_way(package: str, forbidden: list[str]) -> None:
    for name, imported in within(package).items():
        for other in forbidden:
            wrong = {i for i in imported if f"{i}.".startswith(f"moce.{other}.")}
            assert not wrong, f"{name} imports {wrong}"


def test_nothing_but_main_imports_the_command_line() -> None:
    assert importers("moce.cli") <= {"moce.__main__"}


def test_nothing_imports_the_verbs_by_name_but_verbs_and_types() -> None:
    """The registry imports them by string, the package for type checkers only."""
    assert importers("moce.commands") <= {"moce"}


def test_imports_have_no_cycle() -> None:
    modules = set(IMPORTS)
    graph = {name: (imported & modules) - {name, "moce"} for name, imported in IMPORTS.items()}
    graph.pop("moce")  # imports for type checkers only
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


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_run_function(verb: str) -> None:
    assert VERBS[verb].name == verb
    assert callable(import_module(f"moce.verbs.{verb}").run)
    assert set(VERBS[verb].positional) <= VERBS[verb].settings.model_fields.keys()


UNSAFE = SOURCE / "interop" / "pickled.py"


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
