"""MoceError: a user's mistake, reported in one line; and how a run is stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals


class MoceError(Exception):
    """A mistake that the user can fix. The message says in one line what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 image", "2,000 images"; plural: where it is more than noun + s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


class OutOfMemory(MoceError):
    """Training has run out of memory; the message says what takes less."""

    exit_status = 1


def is_out_of_memory(error: BaseException) -> bool:
    """Python's error, torch's on accelerators (by its name: torch is not imported) and on CPUs."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


class Unreachable(MoceError):
    """A remote file cannot be read: no fault of one image, so the run stops."""


class NotFinite(MoceError):
    """The loss or the weights are not finite numbers."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C, so that running code cleans up."""


def signal_of(stop: KeyboardInterrupt) -> Signals:
    """The signal that caused an interruption."""
    return SIGTERM if isinstance(stop, Terminated) else SIGINT


class Interrupted(MoceError):
    """A run was stopped (Ctrl-C, SIGTERM) and has saved its state."""

    def __init__(
        self, number: int, folder: object, done: str, advice: str = "resume with --resume"
    ) -> None:
        """number: of the signal; done: how far the run got, such as "step 40"."""
        super().__init__(f"stopped after {done}, saved in {folder}; {advice}")
        self.exit_status = 128 + number  # as shells report a process ended by this signal


@contextmanager
def raise_if_corrupt(path: Path | str) -> Iterator[None]:
    """Report errors while using the contents of a file as MoceError "PATH is corrupt".

    Files can be edited, so they may contain anything.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        missing = f"it lacks {reason}" if isinstance(e, KeyError) else reason
        raise MoceError(f"{path} is corrupt or was edited: {missing[:300]}") from None
