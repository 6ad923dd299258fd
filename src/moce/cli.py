"""The command line: flags made from the settings classes, recipes, errors as one line."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import traceback
import typing
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from moce.commands.registry import COMMANDS, Command
from moce.config import Settings
from moce.config.load import read_recipe, read_yaml
from moce.errors import MoceError, signal_of
from moce.runtime.launch import ALONE, first_to_fail, launch, launched_as_rank0, leave
from moce.runtime.signals import terminable

FAILED = 1
REPLACES = {"lr_grid": "base_lr"}  # settings, and what of a recipe has no use beside them
INTERRUPTED = 128  # and the number of the signal, as shells report it


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status.

    0 done, 1 the system failed it, 2 a mistake to mend, 130 or 143 stopped by Ctrl-C or SIGTERM.
    """
    options = vars(build_parser().parse_args(arguments))
    name = options.pop("command")
    if name is None:
        build_parser().print_help()
        return 2
    try:
        with terminable():
            result = COMMANDS[name].run(_values(COMMANDS[name].settings, options))
        if launched_as_rank0():
            _print_result(result, as_json=options.get("json", False))
    except (Exception, KeyboardInterrupt) as error:
        return _fail(COMMANDS[name], error)
    return getattr(result, "exit_status", 0)


def _fail(command: Command, error: BaseException) -> int:
    """Say why a command has failed; its exit status. Of several processes, the first to fail does.

    A defect of moce keeps its traceback.
    """
    status = _exit_status(error)
    if status is None and launch() is ALONE:
        raise error
    if first_to_fail():  # else another process is gone, which has said why
        if status is None:
            traceback.print_exception(error)
        else:
            label = "error: " if status < INTERRUPTED else ""
            print(f"moce {command.name}: {label}{_told(error, command)}", file=sys.stderr)
    status = FAILED if status is None else status
    if launch() is not ALONE:
        leave(status)
    return status


def _exit_status(error: BaseException) -> int | None:
    """The exit status after an error that is told in one line; None if it is a defect of moce."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED + signal_of(error)
    if isinstance(error, MoceError):
        return getattr(error, "exit_status", 2)
    return FAILED if isinstance(error, OSError) or _is_out_of_memory(error) else None


def _told(error: BaseException, command: Command) -> str:
    """The one line on an error that has an exit status, whatever names are in it."""
    if isinstance(error, KeyboardInterrupt):
        go_on = "; go on with --resume" if "resume" in command.settings.model_fields else ""
        return f"interrupted{go_on}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if _is_out_of_memory(error):
        fields = command.settings.model_fields.keys()
        sizes = {"micro_batch_size", "batch_size"} & fields
        smaller = f"; try a smaller --{max(sizes).replace('_', '-')}" if sizes else ""
        on_gpu = "CUDA" in str(error) and "cache_on_gpu" in fields
        return f"out of memory{smaller}{', or --no-cache-on-gpu' if on_gpu else ''}"
    return " ".join(str(error).split())


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's own, torch's on accelerators (told by its name: torch is not imported) and on CPUs."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moce",
        description="One masked-autoencoder pre-training, a vision backbone for every task.",
        epilog="Order of work: pretrain, cluster, train, customize, then probe or finetune. "
        "See it all at once: moce demo",
    )
    parser.add_argument("--version", action="version", version=f"moce {version('moce')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS.values():
        _add_command(commands, command)
    return parser


class _Parser(argparse.ArgumentParser):
    """Names the nearest valid flag when one is unknown."""

    def error(self, message: str) -> typing.NoReturn:
        told = f"{self.prog}: error: {_nearer(message)} (see {self.prog} --help)\n"
        self.exit(2, told if launched_as_rank0() else None)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        if words and words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
            self.error(f"{words[0]} is no verb; flags come after it")
        options, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.prog = f"{self.prog} {options.command}" if options.command else self.prog
            self.error(_unknown_flags(unknown, options.command))
        return options


def _nearer(message: str) -> str:
    """argparse's message; of an unknown verb, ours, with the nearest one."""
    found = re.match(r"argument COMMAND: invalid choice: '(.*?)' \(", message, re.DOTALL)
    if found is None:
        return message
    near = difflib.get_close_matches(found[1], COMMANDS, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown verb '{found[1]}'; {hint}verbs: {', '.join(COMMANDS)}"


def _unknown_flags(unknown: list[str], command: str | None) -> str:
    flags = (
        [_flag(name)[2:] for name, field in _fields(COMMANDS[command].settings)] if command else []
    )
    flag = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
    near = difflib.get_close_matches(flag.lstrip("-"), [*flags, "config", "help"], n=1)
    return f"unknown argument {flag}" + (f"; did you mean --{near[0]}?" if near else "")


def _fields(settings: type[Settings]) -> list[tuple[str, FieldInfo]]:
    return [(field.alias or name, field) for name, field in settings.model_fields.items()]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_command(commands: Any, command: Command) -> None:
    summary = (command.settings.__doc__ or "").strip()
    parser = commands.add_parser(
        command.name,
        help=summary,
        description=summary,
        epilog=f"example: {command.example}",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    common = {name for name, _ in _fields(Settings)}
    for name, field in sorted(_fields(command.settings), key=lambda pair: pair[0] in common):
        if name in command.positional:
            many = "*" if typing.get_origin(field.annotation) is tuple else None
            # Optional here, because a recipe may give it; the settings class insists on it.
            parser.add_argument(name, metavar=name.upper(), nargs=many or "?", help=_help(field))
        elif field.annotation is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(_flag(name), dest=name, action=action, help=_help(field))
        else:
            parser.add_argument(_flag(name), dest=name, metavar=_metavar(field), help=_help(field))
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML recipe of settings; flags win over it"
    )


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    if field.is_required():
        return f"{text} (required)"
    hidden = field.default is None or field.default is False or field.default in ((), {})
    return text if hidden else f"{text} (default: {_show(field.default)})"


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "yes" if value is True else str(value)


def _metavar(field: FieldInfo) -> str:
    if _holds(field, tuple):
        return "A,B,..."
    for kind in (field.annotation, *typing.get_args(field.annotation)):
        if typing.get_origin(kind) is Literal:
            return "{" + ",".join(typing.get_args(kind)) + "}"
    for kind, shown in ((float, "X"), (int, "N"), (Path, "PATH"), (dict, "YAML")):
        if _holds(field, kind) or kind in _bare_types(field):
            return shown
    return "NAME"


def _bare_types(field: FieldInfo) -> list[Any]:
    """The types in Annotated[int, ...] | None, without what annotates them."""
    return [
        typing.get_args(kind)[0]
        for kind in typing.get_args(field.annotation)
        if typing.get_args(kind)
    ]


def _values(settings: type[Settings], options: dict[str, Any]) -> dict[str, Any]:
    """Settings of the recipe, overridden by those of the flags."""
    recipe = options.pop("config", None)
    fields = dict(_fields(settings))
    given = {
        n: _read(n, fields[n], value) for n, value in options.items() if value not in (None, [])
    }
    values = {**(read_recipe(recipe) if recipe else {}), **given}
    replaced = {other for name, other in REPLACES.items() if values.get(name)} - given.keys()
    return {n: value for n, value in values.items() if n not in replaced}


def _read(name: str, field: FieldInfo, value: Any) -> Any:
    """Lists are written 9,11 and mappings as YAML; everything else is for the settings to read."""
    if not isinstance(value, str):
        return value
    if _holds(field, dict):
        try:
            return read_yaml(value)
        except ValueError:
            raise MoceError(f"{_flag(name)} is not valid YAML: {value[:200]}") from None
    if _holds(field, tuple):
        return [part for part in value.split(",") if part]
    return value


def _holds(field: FieldInfo, kind: type) -> bool:
    """Whether a field is of this kind, or of it or None."""
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    return any(known is kind or typing.get_origin(known) is kind for known in kinds)


def _print_result(result: Any, *, as_json: bool) -> None:
    if as_json and is_dataclass(result):
        content = result.to_json() if hasattr(result, "to_json") else asdict(result)  # type: ignore[arg-type]
        _write(json.dumps(content, indent=2, default=str))
    else:
        _write(result.summary())


def _write(text: str) -> None:
    """Print to stdout, whose encoding may have no room for names, or for ±; if it is closed, nowhere."""
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    sys.exit(main())
