"""Every function of the package is checked while tests run, whichever way it is wrapped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError

import typechecker
from fedpeat.config.schema import LocalConfig
from fedpeat.core.wire import Payload
from fedpeat.experiments.results import gap_closed
from tiny import random_text

TEXT: Any = "7"


@pytest.mark.parametrize(
    "call",
    [
        lambda: gap_closed(TEXT, 20.0, 10.0),
        lambda: Payload(arrays={}, record=TEXT),
        lambda: replace(LocalConfig(), local_steps=TEXT),
        lambda: random_text().head(TEXT),
        lambda: replace(random_text(8), input_ids=random_text(7).input_ids),
    ],
    ids=["function", "dataclass", "changed dataclass", "method", "dataclass with axes"],
)
def test_a_value_of_another_type_is_noticed(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeCheckError):
        call()


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as the import hook would leave it."""
    wrapped: Callable[..., Any] = typechecker.checked(typechecker=typechecker.check)(function)
    return wrapped


def test_axes_of_arguments_and_results_must_agree() -> None:
    def doubled(
        one: Float[np.ndarray, " axis"], other: list[Float[np.ndarray, " axis"]]
    ) -> Float[np.ndarray, " axis"]:
        return one * 2 if other else np.zeros(9)

    run = checked(doubled)
    assert run(np.ones(2), [np.ones(2)]).tolist() == [2, 2]
    with pytest.raises(TypeCheckError):
        run(np.ones(2), [np.ones(3)])
    with pytest.raises(TypeCheckError):
        run(np.ones(2), [])


def test_a_result_of_another_type_is_noticed() -> None:
    def number(text: str) -> int:
        return text  # type: ignore[return-value]

    with pytest.raises(TypeCheckError):
        checked(number)("3")
