"""The run-time type checker of the tests: beartype, with an int for a float (PEP 484).

jaxtyping's hook wraps every function in a context of its own for the sizes of axes. That makes a
run of a tiny federation half as long again, and only a function with axes in its hints has any use
for it. The others get beartype alone, which checks the same hints.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError

# a violation is a TypeError, as jaxtyping's own is, and as the code that is checked would raise
check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeCheckError))
with_axes: Callable[..., Any] = jaxtyping.jaxtyped


def checked(*, typechecker: Any) -> Callable[[Any], Any]:
    """Return the decorator that jaxtyping's hook puts on every function and class."""

    def decorator(target: Any) -> Any:
        if not isinstance(target, type):
            return (
                with_axes(target, typechecker=typechecker) if _needs_axes(target) else check(target)
            )
        if dataclasses.is_dataclass(target) and "__init__" in vars(target):
            target.__init__ = decorator(target.__init__)  # type: ignore[method-assign]
        return target

    return decorator


def _needs_axes(function: Callable[..., Any]) -> bool:
    """Say whether a hint has axes, or cannot be told, which jaxtyping takes for Any."""
    if inspect.isgeneratorfunction(function):
        return True  # beartype would look at its arguments only when the first item is asked for
    try:
        return _has_axes(list(get_type_hints(function, include_extras=True).values()))
    except (AttributeError, NameError, TypeError):
        return True


def _has_axes(hint: object) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_has_axes, hint if isinstance(hint, list) else get_args(hint)))


# what the hook's code finds when a module of fedpeat is imported
jaxtyping.jaxtyped = checked  # type: ignore[assignment]
