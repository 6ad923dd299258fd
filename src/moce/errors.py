"""The one error that users are meant to see, what becomes one, and how a run is asked to stop."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals


class MoceError(Exception):
    """A mistake the user can mend. The message says in one line what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class NotFinite(MoceError):
    """The loss or the weights of a training are not finite numbers."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken as Ctrl-C is: what is under way cleans up after itself."""


def signal_of(stop: KeyboardInterrupt) -> Signals:
    """The signal that is behind an interruption."""
    return SIGTERM if isinstance(stop, Terminated) else SIGINT


class Interrupted(MoceError):
    """A run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""

    def __init__(
        self, number: int, folder: object, done: str, go_on: str = "go on with --resume"
    ) -> None:
        """number: of the signal; done: what the folder holds the state after, such as "step 40"."""
        super().__init__(f"stopped after {done}, saved in {folder}; {go_on}")
        self.exit_status = 128 + number  # as shells report a process ended by this signal


@contextmanager
def raise_if_corrupt(path: Path) -> Iterator[None]:
    """While what a file says is made use of: whatever goes wrong then, MoceError says that it is damaged.

    Files can be edited, so that anything may stand in the place of anything.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        missing = f"it lacks {reason}" if isinstance(e, KeyError) else reason
        raise MoceError(f"{path} is damaged or was edited: {missing[:300]}") from None
