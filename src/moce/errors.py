"""The one error that users are meant to see."""


class MoceError(Exception):
    """A mistake the user can mend. The message says in one line what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class NotFinite(MoceError):
    """The loss or the weights of a training are not finite numbers."""


class Interrupted(MoceError):
    """A run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""

    def __init__(
        self, number: int, folder: object, done: str, go_on: str = "go on with --resume"
    ) -> None:
        """number: of the signal; done: what the folder holds the state after, such as "step 40"."""
        super().__init__(f"stopped after {done}, saved in {folder}; {go_on}")
        self.exit_status = 128 + number  # as shells report a process ended by this signal
