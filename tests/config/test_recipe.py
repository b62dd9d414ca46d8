"""Recipes are read, or refused with the place of what is wrong."""

from __future__ import annotations

import pytest

from fedpeat.config.recipe import STEPS, Step, parse_recipe
from fedpeat.core.errors import ConfigError
from fedpeat.emulator.selection import SELECTIONS


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("full", [Step("full")]),
        ("layer_drop:0.5", [Step("layer_drop", 0.5)]),
        ("greedy:1", [Step("greedy", 1.0)]),
        ("greedy:0.5+distill:2e5", [Step("greedy", 0.5), Step("distill", 200_000)]),
        ("distill:9", [Step("full"), Step("distill", 9)]),
    ],
)
def test_recipe_is_read_step_by_step(text: str, steps: list[Step]) -> None:
    assert list(parse_recipe(text).steps) == steps


@pytest.mark.parametrize("text", ["full", "cka:0.25", "greedy:0.5+distill:200000"])
def test_recipe_is_written_as_it_was_read(text: str) -> None:
    assert str(parse_recipe(text)) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "character 1: no step ''; allowed: full, layer_drop"),
        ("gredy:0.5", "character 1: no step 'gredy'; did you mean 'greedy'?"),
        ("layer_drop", "character 11: layer_drop needs a ratio in (0, 1], e.g. layer_drop:0.5"),
        ("layer_drop:0", "character 12: layer_drop needs a ratio in (0, 1], got '0'"),
        ("layer_drop:nan", "character 12: layer_drop needs a ratio in (0, 1], got 'nan'"),
        ("layer_drop:0,5", "character 12: layer_drop needs a ratio in (0, 1], got '0,5'"),
        ("full:1", "character 5: full takes no value"),
        ("cka:0.5+distil:9", "character 9: no step 'distil'; did you mean 'distill'?"),
        ("cka:0.5+distill:1.5", "character 17: distill needs a whole number of tokens, at least 1"),
        ("distill:9+cka:0.5", "character 11: cka cannot come after distill; swap them"),
        ("cka:0.5+greedy:0.5", "character 9: greedy cannot come after cka; only one of the two"),
    ],
)
def test_recipe_that_cannot_be_read_shows_where(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text)
    assert str(caught.value).startswith(f"emulator.recipe {text!r}, {problem}")


def test_every_choice_of_blocks_in_a_recipe_is_there() -> None:
    chosen = {name for name, kind in STEPS.items() if kind.stage == 0}
    assert chosen == {"full", *SELECTIONS}


@pytest.mark.parametrize(
    ("text", "is_full"),
    [("full", True), ("greedy:1", True), ("greedy:0.9", False), ("distill:9", False)],
)
def test_only_a_recipe_that_changes_nothing_is_full(text: str, *, is_full: bool) -> None:
    assert parse_recipe(text).is_full == is_full
