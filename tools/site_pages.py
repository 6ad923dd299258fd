"""Pages of the documentation site that are made from other files; hooks of MkDocs (see mkdocs.yml).

The README, CONTRIBUTING.md and CHANGELOG.md, the notebook, and a reference of all commands, which
is made from the settings classes.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from moce.commands.registry import COMMANDS, Command
from moce.config.usage import flag

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the sections of the menu that need no list: a new page must not be forgotten."""
    listed = str(config.nav)
    sections = {name: part for item in config.nav or [] for name, part in item.items()}
    sections["How to"] += _entries(DOCS / "howto")
    sections["Further"] += [
        e for e in _entries(DOCS) if f"'{next(iter(e.values()))}'" not in listed
    ]
    config.nav = [item for item in config.nav or [] if next(iter(item.values()))]
    return config


def _entries(folder: Path) -> list[dict[str, str]]:
    """Title and path of every page of a folder."""
    pages = sorted(folder.glob("*.md"))
    titles = [page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for page in pages]
    paths = [page.relative_to(DOCS).as_posix() for page in pages]
    return [{title: path} for title, path in zip(titles, paths, strict=True)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a file of the repository that is no page becomes plain text."""
    folder = posixpath.dirname(page.file.src_uri)

    def replace(link: re.Match[str]) -> str:
        path = link[3].partition("#")[0]
        known = "://" in path or not path
        target = posixpath.normpath(posixpath.join(folder, path))
        return link[0] if known or files.get_file_from_path(target) else link[2]

    return LINK.sub(replace, markdown)


def pages() -> dict[str, str]:
    """The Markdown of every generated page, by its path on the site."""
    return {
        "index.md": _of_the_root("README.md"),
        "CONTRIBUTING.md": _of_the_root("CONTRIBUTING.md"),
        "CHANGELOG.md": _of_the_root("CHANGELOG.md"),
        "SOURCES.md": _of_the_root("src/moce/data/assets/SOURCES.md"),
        "tutorial.md": notebook_page(DOCS / "tutorial.ipynb"),
        "reference/commands.md": commands_page(),
    }


def _of_the_root(name: str) -> str:
    """A page of the repository with its links as they are on the site, where docs/ is the root."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = text.replace("](docs/tutorial.ipynb)", "](tutorial.md)")
    return text.replace("](docs/", "](").replace("](src/moce/data/assets/", "](")


def notebook_page(path: Path) -> str:
    """The cells of a notebook; code as a block, without output."""
    cells = nbformat.read(path, as_version=4).cells
    shown = [f"```python\n{c.source}\n```" if c.cell_type == "code" else c.source for c in cells]
    return "\n\n".join(shown) + "\n"


# --- commands -------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its example and a table of its settings."""
    introduction = (
        "# Commands\n\nEvery setting is a flag, a line of a recipe (`--config recipe.yaml`) and a "
        "keyword argument of the Python function with the command's name. Recipes and Python "
        "write underscores where flags have dashes. Every command also has `--json`.\n"
    )
    return "\n".join([introduction, *(_section(command) for command in COMMANDS.values())])


def _section(command: Command) -> str:
    rows = [_row(command, name) for name in command.settings.model_fields]
    return "\n".join(
        [
            f"## moce {command.name}\n",
            f"{(command.settings.__doc__ or '').strip()}\n",
            f"    {command.example}\n",
            "| setting | type | default | |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _row(command: Command, name: str) -> str:
    field = command.settings.model_fields[name]
    parameter = command.signature.parameters[name]
    shown = name.upper() if name in command.positional else flag(name)
    hidden = field.is_required() or field.default in (None, (), {})
    default = "required" if field.is_required() else "" if hidden else f"`{field.default}`"
    cells = (f"`{shown}`", f"`{_short(parameter.annotation)}`", default, field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _short(annotation: Any) -> str:
    """A type as in the signature, but a choice as its values."""
    text = str(annotation).replace("str | Path", "Path").replace(" | None", "")
    choice = re.fullmatch(r"Literal\[(.*)\]", text)
    return choice[1].replace("'", "").replace(", ", " / ") if choice else text
