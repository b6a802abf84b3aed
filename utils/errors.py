"""The exceptions whose message is meant for the person at the terminal. Entry scripts print it as one line on stderr."""

import contextlib
import reprlib
from collections.abc import Iterator
from typing import Any

MAX_SHOWN = 200  # characters of what somebody else wrote, in one message


class UserError(ValueError):
    """Bad input, found before anything is trained; exit status 2.

    The message is one line that names the flag or file, the value, and what would be right.
    """


class ParameterError(UserError):
    """A parameter has a value that it cannot have: `keep_ratio 1.5: must be above 0 and at most 1`.

    Whoever computes calls it as the function does; the command line puts its flag in that place (`Parser.naming_flags`).
    """

    def __init__(self, parameter: str, value: object, reason: str):
        """`value` None names the parameter alone."""
        super().__init__(f"{parameter}{_given(value)}: {reason}")
        self.parameter, self.value, self.reason = parameter, value, reason

    def under(self, name: str) -> str:
        """The message with another name in the parameter's place."""
        return f"{name}{_given(self.value)}: {self.reason}"


def _given(value: object) -> str:
    if value is None or isinstance(value, bool):
        return ""
    values = value if isinstance(value, list | tuple) else (value,)
    return "".join(f" {each:g}" if isinstance(each, float) else f" {each}" for each in values)


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """Text of others as one line that a terminal, a log and any file can take, of at most `limit` characters.

    Control characters, line ends and halves of surrogate pairs are written as escapes; the middle of a longer text is dots.
    """
    if len(text) > limit:  # twice: it may be long before, and escapes are longer than what they stand for
        text = _shortened(text, limit)
    escaped = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return _shortened(escaped, limit) if len(escaped) > limit else escaped


def _shortened(text: str, limit: int) -> str:
    end = (limit - 3) // 3
    return f"{text[: limit - 3 - end]}...{text[-end:] if end else ''}"


def shown(value: Any, limit: int = MAX_SHOWN) -> str:
    """A value of a file that others may have written, as Python writes it, within `limit` characters on one line."""
    return printable(_SHORT.repr(value), limit)


def spreadsheet_text(text: str) -> str:
    """Text as a spreadsheet shows it: what it would take for a formula begins with an apostrophe."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


class _Short(reprlib.Repr):
    """Also of whole numbers that have more digits than Python is willing to write."""

    def repr_int(self, value: int, level: int) -> str:
        return (
            super().repr_int(value, level) if value.bit_length() < 4 * MAX_SHOWN else f"<a number of {value.bit_length()} bits>"
        )


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = MAX_SHOWN


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
