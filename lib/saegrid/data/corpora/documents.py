"""A document, and the checks that turn one row of a corpus into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from saegrid.errors import ConfigError, shown

Content = str | tuple[str, str] | list[dict[str, str]]
"""A text, a question and its answer, or the messages of a conversation."""
FORMS = (("question", "answer"), ("text",), ("messages",))
"""Fields that hold a row's content; the first that exist are used."""
ROLES = ("system", "user", "assistant", "tool")
FEW, PART = 100, 10_000
"""In a corpus of fewer than `FEW` texts, those of more than `PART` characters are divided into several documents."""


class Document(NamedTuple):
    index: int  # type: ignore[assignment]
    """Its problem template if there is one, else its own number: the unit that splits do not share."""
    content: Content


def content_fields(columns: Iterable[str], text_field: str, where: str) -> tuple[str, ...]:
    """The fields that hold a row's content. Raises `ConfigError` if there are none."""
    columns = [str(name) for name in columns]
    has = f"it has {', '.join(columns)}" if columns else "it has no fields"
    if text_field:
        if text_field not in columns:
            raise ConfigError(f"text_field = {text_field!r}: no such field in {where}; {has}")
        return (text_field,)
    for names in FORMS:
        if set(names) <= set(columns):
            return names
    raise ConfigError(f"{where}: needs text, messages, or question and answer, or a text_field that exists; {has}")


def content_of(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> Content:
    """The content of a row with these fields. Raises `ConfigError` if it is neither text nor messages."""
    missing = [name for name in names if name not in row]
    if missing:
        raise ConfigError(f"{where}: no field {missing[0]}")
    values = [row[name] for name in names]
    if len(names) == 2:
        question, answer = (_text(value, name, where) for name, value in zip(names, values, strict=True))
        return question, answer
    if isinstance(values[0], list):
        return _messages(values[0], names[0], where)
    return _text(values[0], names[0], where)


def plain(text: str, where: str) -> str:
    """The same text. Raises `ConfigError` if it has NUL characters or is not valid Unicode."""
    if "\0" in text:
        raise ConfigError(f"{where}: holds NUL characters, so it is not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: holds half of a surrogate pair at character {error.start}") from None
    return text


def documents(contents: Iterable[Content], count: int, start: int = 0) -> Iterator[Document]:
    """The documents that are not blank, numbered from `start`. `count`: number of texts in the corpus (see `FEW`)."""
    parts = (part for content in contents for part in (_parts(content) if count < FEW else [content]))
    for index, part in enumerate(parts, start):
        if not isinstance(part, str) or part.strip():
            yield Document(index, part)


def _parts(text: Content) -> Iterator[Content]:
    """A text in parts of at most `PART` characters, divided at a blank line, else at a line break, else at a space."""
    if not isinstance(text, str):
        yield text
        return
    start = 0
    while len(text) - start > PART:
        low, high = start + PART // 2, start + PART
        ends = (at + len(mark) for mark in ("\n\n", "\n", " ") if (at := text.rfind(mark, low, high)) >= 0)
        end = next(ends, high)
        yield text[start:end]
        start = end
    yield text[start:]


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name} must be text, is {shown(value)}")
    return plain(value, where)


def _messages(messages: list[Any], name: str, where: str) -> list[dict[str, str]]:
    if not messages:
        raise ConfigError(f"{where}: {name} is empty")
    for number, message in enumerate(messages, 1):
        place = f"{where}: message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ConfigError(f"{place} needs role and content, is {shown(message)}")
        if message["role"] not in ROLES:
            raise ConfigError(f"{place}: role = {shown(message['role'])}: must be one of {', '.join(ROLES)}")
        _text(message["content"], "content", place)
    return [{name: message[name] for name in ("role", "content")} for message in messages]
