"""HTML that cannot be injected into: text is escaped on its way in, and stays apart by its type."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Final

__all__ = ["Html", "clean", "element", "join", "literal"]

_VOID: Final = frozenset({"meta", "br", "link"})
# control characters, lone surrogates, marks that reorder text: legal in JSON, harmful in a page
_HARMFUL: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


class Html(str):
    """Markup that is already safe; anything else is text and gets escaped."""

    __slots__ = ()


def clean(text: str) -> str:
    """Return a text with every harmful character made visible as U+FFFD."""
    return _HARMFUL.sub("\ufffd", text.replace("\r\n", "\n"))


def _escaped(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(clean(str(value))))


def join(parts: Iterable[object]) -> Html:
    """Return parts one after another, texts escaped."""
    return Html("".join(_escaped(part) for part in parts))


def literal(trusted: str) -> Html:
    """Return markup that this package wrote itself; never pass text from a file."""
    return Html(trusted)


def element(name: str, *children: object, **attributes: object) -> Html:
    """Return an element; ``class_`` stands for class, ``aria_label`` for aria-label.

    Args:
        name: Tag name.
        children: Html as is, anything else as escaped text.
        attributes: Attribute values, escaped; None leaves one out, floats get two decimals.
    """
    pairs = "".join(
        f' {_attribute_name(key)}="{_escaped(_attribute_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{pairs}>")
    return Html(f"<{name}{pairs}>{join(children)}</{name}>")


def _attribute_name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _attribute_value(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
