"""Recipes: how an emulator is made, as one line, e.g. "greedy:0.5+distill:200000"."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedpeat.core.errors import ConfigError

__all__ = ["STEPS", "Recipe", "Step", "StepKind", "parse_recipe"]

Value = Literal["ratio", "tokens", "none"]


@dataclass(frozen=True)
class StepKind:
    """What a step of a recipe does.

    Attributes:
        stage: Steps stand in the order of their stages: 0 chooses blocks, 1 makes layers smaller, 2
            trains, 3 stores weights in fewer bits. Only one step of stages 0 and 3 makes sense.
        value: What stands after the colon.
        meaning: One line of help.
    """

    stage: int
    value: Value
    meaning: str


STEPS: Mapping[str, StepKind] = {
    "full": StepKind(0, "none", "keep every block"),
    "layer_drop": StepKind(0, "ratio", "keep evenly spaced blocks"),
    "influence": StepKind(0, "ratio", "keep the blocks that change their input most"),
    "greedy": StepKind(
        0, "ratio", "drop blocks one by one, each time the one the loss needs least"
    ),
    "cka": StepKind(0, "ratio", "keep the middle block of each group of like neighbours"),
    "width": StepKind(
        1, "ratio", "keep this share of the neurons inside the kept middle blocks, refit the rest"
    ),
    "heads": StepKind(
        1, "ratio", "keep this share of the attention heads of the kept middle blocks"
    ),
    "distill": StepKind(2, "tokens", "train the kept middle blocks to stand in for all"),
    "int8": StepKind(3, "none", "store matrices in 8 bits"),
    "int4": StepKind(3, "none", "store matrices in 4 bits"),
}
_ONE_AT_MOST = {0, 3}
_STEP = re.compile(r"([a-z][a-z0-9_]*)(?::([^:+]*))?")


@dataclass(frozen=True)
class Step:
    """One step of a recipe; ``value`` is 0 where the step takes none."""

    name: str
    value: float = 0.0

    def __str__(self) -> str:
        kind = STEPS[self.name].value
        if kind == "none":
            return self.name
        return (
            f"{self.name}:{int(self.value)}" if kind == "tokens" else f"{self.name}:{self.value:g}"
        )


@dataclass(frozen=True)
class Recipe:
    """The steps of a recipe, in order; the first chooses the blocks."""

    steps: tuple[Step, ...]

    @property
    def selection(self) -> Step:
        """Step that chooses the blocks."""
        return self.steps[0]

    @property
    def is_full(self) -> bool:
        """Whether the emulator is the full model itself."""
        return self.keeps_every_block and len(self.steps) == 1

    @property
    def keeps_every_block(self) -> bool:
        """Whether no block is dropped."""
        return self.selection.name == "full" or self.selection.value == 1

    @property
    def ratio(self) -> float:
        """Share of the blocks that it keeps."""
        return 1.0 if self.selection.name == "full" else self.selection.value

    def at(self, ratio: float) -> Recipe:
        """Return the same recipe with another share of the blocks."""
        return Recipe((Step(self.selection.name, ratio), *self.steps[1:]))

    def has(self, name: str) -> bool:
        """Return whether a step is part of it."""
        return any(step.name == name for step in self.steps)

    def __str__(self) -> str:
        return "+".join(map(str, self.steps))


def parse_recipe(text: str) -> Recipe:
    """Return the steps of a recipe.

    Args:
        text: Steps joined by "+", each a name or name:value. A recipe that chooses no blocks keeps
            all of them.

    Raises:
        ConfigError: If it cannot be read; the message shows where.
    """
    steps, place = [], 0
    for part in text.split("+"):
        steps.append(_parse_step(text, part, place))
        place += len(part) + 1
    for before, after in itertools.pairwise(steps):
        first, second = STEPS[before.name].stage, STEPS[after.name].stage
        if first > second or (first == second and first in _ONE_AT_MOST):
            order = "only one of the two makes sense" if first == second else "swap them"
            raise _error(
                text,
                text.index(f"+{after.name}") + 1,
                f"{after.name} cannot come after {before.name}; {order}",
            )
    if STEPS[steps[0].name].stage > 0:
        steps.insert(0, Step("full"))
    return Recipe(tuple(steps))


def _parse_step(text: str, part: str, place: int) -> Step:
    match = _STEP.fullmatch(part)
    if match is None or match[1] not in STEPS:
        name = match[1] if match else part
        close = difflib.get_close_matches(name, STEPS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(STEPS)}"
        raise _error(text, place, f"no step {name!r}; {hint}")
    name, value = match[1], match[2]
    kind = STEPS[name].value
    at_value = place + len(name)
    if kind == "none":
        if value is not None:
            raise _error(text, at_value, f"{name} takes no value")
        return Step(name)
    if value is None:
        raise _error(text, at_value, f"{name} needs {_WANTED[kind]}, e.g. {name}:{_EXAMPLES[kind]}")
    number = _number(value)
    fits = 0 < number <= 1 if kind == "ratio" else number >= 1 and number == int(number)
    if not fits:
        raise _error(text, at_value + 1, f"{name} needs {_WANTED[kind]}, got {value!r}")
    return Step(name, number)


_WANTED = {"ratio": "a ratio in (0, 1]", "tokens": "a whole number of tokens, at least 1"}
_EXAMPLES = {"ratio": "0.5", "tokens": "200000"}


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def _error(text: str, place: int, problem: str) -> ConfigError:
    return ConfigError(f"emulator.recipe {text!r}, character {place + 1}: {problem}")
