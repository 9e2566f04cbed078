"""The project's own error type: a user's mistake or a damaged file, reported in one line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


MAX_CHARACTERS = 1000
"""Maximum length of a message, whatever a file's content put into it."""


def ascii_controls(text: str) -> str:
    """Text without characters that would steer a terminal, or that can't be written as UTF-8."""
    return "".join(char if char.isprintable() or char.isspace() else ascii(char)[1:-1] for char in text)


def one_line(text: str) -> str:
    """Text as one line of at most `MAX_CHARACTERS`, without characters that would steer a terminal."""
    line = " ".join(ascii_controls(str(text)).split())
    half = MAX_CHARACTERS // 2 - 1
    return line if len(line) <= MAX_CHARACTERS else f"{line[:half]}…{line[-half:]}"


class SaegridError(ValueError):
    """A mistake that the user can fix. Its message is one line; no traceback is shown for it.

    In a notebook the cell shows the message alone (`_render_traceback_` is IPython's hook for that),
    and papermill ends its stderr with it.

    Args:
        message: what is wrong; `fact` keeps it as one line.
        advice: what to do about it; appended to the error's text.
    """

    def __init__(self, message: str, advice: str = ""):
        self.fact = one_line(message)
        super().__init__(f"{self.fact}; {advice}" if advice else self.fact)

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class ConfigError(SaegridError):
    """A parameter that is unknown, of the wrong type, out of range, or in conflict with another."""


class StoreError(SaegridError):
    """An activation store that is missing, damaged or made from other parameters."""


class SaeFileError(SaegridError):
    """An SAE file that can't be read, or does not match its own description."""


class DiskError(SaegridError):
    """A file that can't be written: a full disk, a limit, a read-only folder."""


class ResultsError(SaegridError):
    """A run's results or a table that is missing, incomplete or damaged."""


class DamagedError(SaegridError):
    """A file that does not match its recorded SHA-256, or can't be read at all."""


def explain(error: ValidationError, known_fields: Iterable[str] = (), flat: bool = False) -> str:
    """The first mistake of a pydantic error as one line: parameter, value, what is allowed.

    Args:
        known_fields: names to list for an unknown parameter.
        flat: whether parameters are not nested; what pydantic then adds to a name is the type that it tried.
    """
    first = error.errors()[0]
    place = first["loc"]
    if flat:
        place = place[:1]
    name = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        known = f"; known are {', '.join(known_fields)}" if known_fields else ""
        return f"{name} = {shown(first['input'])}: no such parameter{known}"
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return reason if not name or reason.startswith(f"{name} = ") else f"{name} = {shown(first['input'])}: {reason}"
    if first["type"] == "missing":
        return f"{name} is missing"
    return f"{name} = {shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error, for a one-line message."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def shown(value: Any) -> str:
    """A value in a message, truncated if long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list that contains itself
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:200]}…"
