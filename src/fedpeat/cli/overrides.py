"""Settings from the command line, on top of those from a file."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import types
from collections.abc import Sequence
from itertools import dropwhile, takewhile
from typing import Any, Literal, Union, get_args, get_origin

import tyro

from fedpeat.config.loading import setting_types
from fedpeat.config.schema import Config
from fedpeat.core.errors import ConfigError

__all__ = ["with_overrides"]

_KINDS = {
    bool: "a switch",
    int: "a whole number",
    float: "a number",
    str: "text",
}
_LISTS = {
    str: "one or more names",
    int: "one or more whole numbers",
    float: "one or more numbers",
}


def with_overrides(config: Config, args: Sequence[str], *, prog: str) -> Config:
    """Return the settings with command-line arguments such as ``--local.local-steps 20`` applied.

    Raises:
        ConfigError: If an argument is unknown or not allowed.
    """
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            changed, unknown = tyro.cli(
                Config,
                default=config,
                args=list(args),
                prog=prog,
                description="Settings of a run.",
                return_unknown_args=True,
            )
    except SystemExit as error:
        if error.code in (0, None):  # --help
            raise
        raise ConfigError(_explain(screen.getvalue(), args)) from error
    if unknown:
        raise ConfigError(_unknown(unknown[0], args))
    return changed


def _unknown(token: str, args: Sequence[str]) -> str:
    if not token.startswith("--"):
        return _unexpected(token, args)
    name = _name_of(token)
    names = list(setting_types())
    elsewhere = [known for known in names if known.endswith("." + name.rsplit(".", 1)[-1])]
    close = elsewhere + difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {_option(close[0])}?" if close else "fedpeat settings lists all"
    return f"unknown option {token.partition('=')[0]}; {hint}"


def _unexpected(token: str, args: Sequence[str]) -> str:
    place = next(i for i, arg in enumerate(args) if token in {arg, arg.partition("=")[2]})
    option = next(
        (arg.split("=")[0] for arg in reversed(args[: place + 1]) if arg.startswith("--")), ""
    )
    part, _, field = option.removeprefix("--").rpartition(".")
    if not option:
        return f"unexpected argument {token!r}; settings are given as --local.local-steps 20"
    if setting_types().get(_name_of(option)) is bool:
        switches = f"--{part}.{field} is true, --{part}.no-{field} is false"
        return f"{option} takes no value, got {token!r}; {switches}"
    return f"{option} got one value too many: {token!r}"


def _explain(frame: str, args: Sequence[str]) -> str:
    """Say in one line what tyro says in a frame: what was wrong, what is allowed, what it got."""
    message = _message(frame)
    own = re.match(
        r"Error parsing \S+: (.* must be .*|\S+ .*, character \d+: .*)", message
    )  # what the settings themselves refuse
    option = re.search(r"--[\w.-]+", message)
    if own or not option:
        return own[1] if own else message or "bad arguments"
    given = _values_of(option[0], args)
    return f"{option[0]} must be {_allowed(setting_types().get(_name_of(option[0])))}, got {given}"


def _message(frame: str) -> str:
    """Return what stands between the title of tyro's frame and its next rule."""

    def is_rule(line: str) -> bool:
        return set(line) <= set("─-")

    lines = [line.strip("│| ") for line in frame.splitlines()[1:]]  # tyro draws in ASCII too
    return " ".join(
        " ".join(takewhile(lambda li: not is_rule(li), dropwhile(is_rule, lines))).split()
    )


def _values_of(option: str, args: Sequence[str]) -> str:
    for index, arg in enumerate(args):
        if _name_of(arg) == _name_of(option) and arg.startswith("--"):
            after = list(takewhile(lambda value: not value.startswith("--"), args[index + 1 :]))
            values = [arg.split("=", 1)[1]] if "=" in arg else after
            return " ".join(map(repr, values)) or "nothing"
    return "nothing"


def _allowed(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return f"{_allowed(parts[0])}, or None"
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is tuple:
        return _LISTS[parts[0]]
    return _KINDS.get(kind, "another value")


def _name_of(option: str) -> str:
    return option.removeprefix("--").split("=")[0].replace("-", "_")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
