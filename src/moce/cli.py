"""The command line: arguments in, one-line errors and exit codes out."""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
import typing
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import shtab
from pydantic.fields import FieldInfo

from moce.commands.registry import COMMANDS, Command
from moce.config.load import closest, read_recipe, read_yaml, renamed
from moce.config.usage import flag, replaced_by
from moce.errors import MoceError, signal_of
from moce.runtime.launch import ALONE, first_to_fail, is_rank0, launch, leave
from moce.runtime.signals import terminable

FAILED, MISTAKE = 1, 2
INTERRUPTED = 128  # plus the number of the signal, as shells report it
ALONE_FLAGS = ("-h", "--help", "--version", "--print-completion")  # flags without a command


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status.

    0 done, 1 a failure of the system, 2 a mistake of the user, 130 or 143 stopped by Ctrl-C or SIGTERM.
    """
    parser = build_parser()
    options = vars(parser.parse_args(arguments))
    name = options.pop("command")
    if name is None:
        parser.print_help()
        return MISTAKE
    command, as_json = COMMANDS[name], options.pop("json", False)
    try:
        with terminable():
            result = command.run(settings_of(command, options), command_line(command))
        if is_rank0():
            _print_result(result, as_json=as_json)
    except (Exception, KeyboardInterrupt) as error:
        return _fail(command, error)
    return getattr(result, "exit_status", 0)


def settings_of(command: Command, options: dict[str, Any]) -> dict[str, Any]:
    """Settings of the recipe, overridden by flags."""
    recipe, fields = options.pop("config", None), command.settings.model_fields
    given = {
        name: _read(name, fields[name], value)
        for name, value in options.items()
        if value not in (None, [])
    }
    values = {**(read_recipe(recipe) if recipe else {}), **given}
    replaced = replaced_by(command.settings, values).keys() - given.keys()
    return {name: value for name, value in values.items() if name not in replaced}


def command_line(command: Command) -> Callable[[str], str]:
    """How a setting is written on the command line: DATA, or --out."""
    return lambda name: name.upper() if name in command.positional else flag(name)


def _read(name: str, field: FieldInfo, value: Any) -> Any:
    """Lists are written 9,11 and mappings as YAML; the settings class reads everything else."""
    if not isinstance(value, str):
        return value
    if _holds(field, dict):
        try:
            return read_yaml(value)
        except ValueError as error:
            why = str(error).partition(' in "<unicode')[0]  # without the line's number
            raise MoceError(f"{flag(name)} is not valid YAML: {value[:200]} ({why})") from None
    return [part for part in value.split(",") if part] if _holds(field, tuple) else value


def _print_result(result: Any, *, as_json: bool) -> None:
    if as_json:
        content = result.to_json() if hasattr(result, "to_json") else asdict(result)
        text = json.dumps(content, indent=2, default=str)
    else:
        text = result.summary()
    if sys.stdout is not None:  # None if it is closed
        encoding = sys.stdout.encoding or "utf-8"  # which may have no room for names, or for ±
        print(text.encode(encoding, "backslashreplace").decode(encoding))


# --- errors ---------------------------------------------------------------------------------------


def _fail(command: Command, error: BaseException) -> int:
    """Print why a command failed; its exit status. Of several processes, only the first to fail prints.

    A bug in moce keeps its traceback.
    """
    status = _exit_status(error)
    if status is None and launch() is ALONE:
        raise error
    if first_to_fail():  # else another process is gone, and has printed why
        if status is None:
            traceback.print_exception(error)
        else:
            label = "error: " if status < INTERRUPTED else ""
            print(f"moce {command.name}: {label}{_one_line(error, command)}", file=sys.stderr)
    status = FAILED if status is None else status
    if launch() is not ALONE:
        leave(status)
    return status


def _exit_status(error: BaseException) -> int | None:
    """The exit status after an error; None for a bug in moce."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED + signal_of(error)
    if isinstance(error, MoceError):
        return getattr(error, "exit_status", MISTAKE)
    return FAILED if isinstance(error, OSError) or _is_out_of_memory(error) else None


def _one_line(error: BaseException, command: Command) -> str:
    settings = command.settings.model_fields
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; resume with --resume" if "resume" in settings else "interrupted"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if _is_out_of_memory(error):
        sizes = {"micro_batch_size", "batch_size"} & settings.keys()
        smaller = f"; try a smaller {flag(max(sizes))}" if sizes else ""
        on_gpu = "CUDA" in str(error) and "cache_on_gpu" in settings
        return f"out of memory{smaller}{', or --no-cache-on-gpu' if on_gpu else ''}"
    return " ".join(str(error).split())


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's error, torch's on accelerators (by its name: torch is not imported) and on CPUs."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


# --- flags ----------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with the nearest valid name."""

    def error(self, message: str) -> typing.NoReturn:
        unknown = re.match(r"argument COMMAND: invalid choice: '(.*?)' \(", message, re.DOTALL)
        if unknown:
            near = closest(unknown[1], COMMANDS)
            hint = f"did you mean '{near}'? " if near else ""
            message = f"unknown command '{unknown[1]}'; {hint}commands: {', '.join(COMMANDS)}"
        line = f"{self.prog}: error: {message} (see {self.prog} --help)\n"
        self.exit(MISTAKE, line if is_rank0() else None)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        first = words[0].partition("=")[0] if words else ""
        if first.startswith("-") and first not in ALONE_FLAGS:
            self.error(f"expected a command before {words[0]}")
        options, unknown = self.parse_known_args(words, namespace)
        if options.command and not any(word.startswith("-") for word in unknown):
            unknown = _after_flags(options, unknown)
        if unknown:
            self.prog = f"{self.prog} {options.command}" if options.command else self.prog
            self.error(_describe_unknown(unknown, options.command))
        return options


def _after_flags(options: argparse.Namespace, words: list[str]) -> list[str]:
    """Take arguments that follow flags, which argparse leaves over where an earlier one may be missing.

    `moce probe runs/mae --solver lbfgs birds/` names DATA, too. Returns the words nothing asks for.
    """
    for name in COMMANDS[options.command].positional:
        if words and getattr(options, name, None) is None:
            setattr(options, name, words[0])
            words = words[1:]
    return words


def _describe_unknown(unknown: list[str], command: str | None) -> str:
    word = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
    fields = COMMANDS[command].settings.model_fields if command else {}
    positive = word.replace("--no-", "--", 1)
    now = renamed().get(positive.lstrip("-").replace("-", "_"))
    if now in fields:
        return f"{word} is now {flag(now, positive == word)}"
    flags = [flag(name) for name in (*fields, "config", "help", "json")]
    near = closest(word, flags)
    return f"unknown argument {word}" + (f"; did you mean {near}?" if near else "")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands: a flag for every setting."""
    parser = _Parser(
        prog="moce",
        description="Pre-train one masked autoencoder, get a vision backbone for every task.",
        epilog="Order of work: pretrain, cluster, train, customize, then probe or finetune. "
        "See it all at once: moce demo",
    )
    parser.add_argument("--version", action="version", version=f"moce {version('moce')}")
    shtab.add_argument_to(
        parser, "--print-completion", help="print the completion script of a shell and exit"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS.values():
        summary = (command.settings.__doc__ or "").strip()
        _add_flags(
            commands.add_parser(
                command.name,
                help=summary,
                description=summary,
                epilog=f"example: {command.example}",
                argument_default=argparse.SUPPRESS,
                allow_abbrev=False,
            ),
            command,
        )
    return parser


def _add_flags(parser: argparse.ArgumentParser, command: Command) -> None:
    for name, field in command.settings.model_fields.items():
        if name in command.positional:
            many = "*" if typing.get_origin(field.annotation) is tuple else None
            # Optional here, because a recipe may give it; the settings class requires it.
            added = parser.add_argument(
                name, metavar=name.upper(), nargs=many or "?", help=_help(field)
            )
            added.complete = shtab.FILE  # type: ignore[attr-defined]
        elif field.annotation is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag(name), dest=name, action=action, help=_help(field))
        else:
            added = parser.add_argument(
                flag(name), dest=name, metavar=_metavar(field), help=_help(field)
            )
            if _holds(field, Path):
                added.complete = shtab.FILE  # type: ignore[attr-defined]
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    recipe = parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML recipe of settings; flags override it"
    )
    recipe.complete = shtab.FILE  # type: ignore[attr-defined]


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
    for kind in _types_of(field):
        if typing.get_origin(kind) is Literal:
            number = ",N" if _holds(field, int) else ""
            return "{" + ",".join(typing.get_args(kind)) + number + "}"
    metavars = {float: "X", int: "N", Path: "PATH", dict: "YAML"}
    return next((shown for kind, shown in metavars.items() if _holds(field, kind)), "NAME")


def _holds(field: FieldInfo, kind: type) -> bool:
    """Whether a field is of this type, or of it or None."""
    return any(known is kind or typing.get_origin(known) is kind for known in _types_of(field))


def _types_of(field: FieldInfo) -> list[Any]:
    """The type of a field, those of a union, and those within Annotated."""
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    bare = [kind.__origin__ for kind in kinds if typing.get_origin(kind) is typing.Annotated]
    return [*kinds, *bare]
