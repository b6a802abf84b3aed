"""The exceptions whose message is meant for the person at the terminal. Entry scripts print it as one line on stderr."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input, found before anything is trained; exit status 2.

    The message is one line that names the flag or file, the value, and what would be right.
    """


@contextlib.contextmanager
def naming(origin: str) -> Iterator[None]:
    """Puts `origin`, a flag and its value, before the message of a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error


class NonFiniteLoss(RuntimeError):
    """Training diverged; the message says where. Exit status 1, the last good checkpoint stays."""


class Interrupted(RuntimeError):
    """A signal asked for an end and the state is saved; exit status 128 + `signal_number`."""

    def __init__(self, message: str, *, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number
