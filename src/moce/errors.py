"""The one error that users are meant to see."""


class MoceError(Exception):
    """A mistake the user can mend. The message says in one line what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class NotFinite(MoceError):
    """The loss or the weights of a training are not finite numbers."""


class Interrupted(MoceError):
    """A run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""

    def __init__(self, number: int, folder: object, step: int) -> None:
        super().__init__(f"stopped after step {step}, saved in {folder}; go on with --resume")
        self.exit_status = 128 + number  # as shells report a process ended by this signal
