"""Each rule that an update must pass, by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedpeat.core.errors import WireError
from fedpeat.core.wire import Payload
from fedpeat.federated.screening import Limits, screen, shown

CURRENT = {"lora_A": np.zeros((2, 3), np.float32), "lora_B": np.zeros(4, np.float32)}
EXPECTED = {"server_round": 7, "emulator": "abc"}
LIMITS = Limits(max_examples=1000, max_update_norm=10.0)
RECORD = {
    "server_round": 7,
    "emulator": "abc",
    "num_examples": 10,
    "first_loss": 3.0,
    "last_loss": 2.0,
    "mean_loss": 2.5,
    "num_tokens": 100,
    "seconds": 0.5,
}
Arrays = dict[str, np.ndarray]


def with_record(**changes: Any) -> Payload:
    record = {**RECORD, **changes}
    return Payload(CURRENT, {k: v for k, v in record.items() if v is not ...})


def with_arrays(change: Callable[[Arrays], object]) -> Payload:
    arrays = {name: array.copy() for name, array in CURRENT.items()}
    change(arrays)
    return Payload(arrays, RECORD)


def with_value(value: float) -> Payload:
    return with_arrays(lambda a: a["lora_B"].__setitem__(2, value))


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


REFUSED: dict[str, tuple[Payload, str]] = {
    "NaN": (with_value(math.nan), "lora_B has values that are not finite"),
    "infinity": (with_value(math.inf), "lora_B has values that are not finite"),
    "minus infinity": (with_value(-math.inf), "lora_B has values that are not finite"),
    "1e30": (with_value(1e30), "update norm must be at most 10, got 1e[+]30"),
    "over the norm bound": (with_value(10.001), "update norm must be at most 10, got 10"),
    "transposed": (
        with_arrays(lambda a: a.update(lora_A=a["lora_A"].T)),
        r"lora_A must be float32 \(2, 3\), got float32 \(3, 2\)",
    ),
    "flattened": (
        with_arrays(lambda a: a.update(lora_A=a["lora_A"].reshape(-1))),
        r"got float32 \(6,\)",
    ),
    "broadcastable": (
        with_arrays(lambda a: a.update(lora_A=a["lora_A"][:1])),
        r"got float32 \(1, 3\)",
    ),
    "float64": (
        with_arrays(lambda a: a.update(lora_A=a["lora_A"].astype(np.float64))),
        "must be float32 .* got float64",
    ),
    "integers": (
        with_arrays(lambda a: a.update(lora_A=a["lora_A"].astype(np.int32))),
        "got int32",
    ),
    "missing tensor": (with_arrays(lambda a: a.pop("lora_B")), "lora_B"),
    "extra tensor": (with_arrays(lambda a: a.update(model=np.zeros(3))), "unexpected: model"),
    "no tensors": (Payload({}, RECORD), "2 in all"),
    "another round's": (with_record(server_round=6), "server_round must be 7, got 6"),
    "round as text": (with_record(server_round="7"), "server_round must be 7, got '7'"),
    "no round": (with_record(server_round=...), "server_round must be 7, got None"),
    "another emulator's": (with_record(emulator="abd"), "emulator must be 'abc', got 'abd'"),
    "nested emulator": (with_record(emulator=nested(5000)), "emulator must be 'abc'"),
    "True examples": (with_record(num_examples=True), "num_examples must be .* got True"),
    "minus one example": (with_record(num_examples=-1), r"in \[1, 1000\], got -1"),
    "no examples": (with_record(num_examples=0), "got 0"),
    "too many examples": (with_record(num_examples=1001), "got 1001"),
    "10^400 examples": (with_record(num_examples=10**400), "num_examples must be"),
    "half examples": (with_record(num_examples=2.5), "got 2.5"),
    "examples as text": (with_record(num_examples="10"), "got '10'"),
    "num_examples missing": (with_record(num_examples=...), "num_examples must be .* got None"),
    "minus one token": (with_record(num_tokens=-1), "num_tokens must be .* got -1"),
    "10^400 tokens": (with_record(num_tokens=10**400), "num_tokens must be"),
    "tokens as a float": (with_record(num_tokens=1e300), "num_tokens must be"),
    "num_tokens missing": (with_record(num_tokens=...), "num_tokens must be .* got None"),
}
for key in ("first_loss", "last_loss", "mean_loss", "seconds"):
    REFUSED |= {
        f"{key} missing": (with_record(**{key: ...}), f"{key} must be a number .* got None"),
        f"{key} NaN": (with_record(**{key: math.nan}), f"{key} must be a number .* got nan"),
        f"{key} infinite": (with_record(**{key: math.inf}), f"{key} must be a number .* got inf"),
        f"{key} text": (with_record(**{key: "2.5"}), f"{key} must be a number .* got '2.5'"),
        f"{key} True": (with_record(**{key: True}), f"{key} must be a number .* got True"),
        f"{key} list": (with_record(**{key: [2.5]}), f"{key} must be a number"),
        f"{key} 10^400": (with_record(**{key: 10**400}), f"{key} must be a number"),
        f"{key} 1e308": (with_record(**{key: 1e308}), f"{key} must be a number"),
    }


@pytest.mark.parametrize("name", REFUSED)
def test_bad_update_is_refused_with_its_reason(name: str) -> None:
    payload, reason = REFUSED[name]
    with pytest.raises(WireError, match=reason) as error:
        screen(payload, CURRENT, EXPECTED, LIMITS)
    assert len(str(error.value)) < 300


def test_proper_update_passes() -> None:
    screen(with_value(9.9), CURRENT, EXPECTED, LIMITS)


def test_whole_numbers_pass_for_losses() -> None:
    screen(with_record(first_loss=3, last_loss=0, seconds=0), CURRENT, EXPECTED, LIMITS)


def test_entries_that_nobody_asked_for_are_ignored() -> None:
    screen(with_record(note="hello", extra=[1, {"a": None}]), CURRENT, EXPECTED, LIMITS)


def test_norm_is_measured_from_the_rounds_adapter_not_from_zero() -> None:
    current = {name: array + 100 for name, array in CURRENT.items()}
    near = Payload({name: array + 1 for name, array in current.items()}, RECORD)
    screen(near, current, EXPECTED, LIMITS)
    with pytest.raises(WireError, match="update norm"):
        screen(Payload(CURRENT, RECORD), current, EXPECTED, LIMITS)


def test_without_a_norm_bound_any_finite_update_passes() -> None:
    screen(with_value(1e30), CURRENT, EXPECTED, Limits(max_examples=1000))


def test_a_norm_that_overflows_is_refused_even_without_a_bound() -> None:
    current = {"w": np.zeros(1)}
    with pytest.raises(WireError, match="got inf"), np.errstate(over="ignore"):
        screen(Payload({"w": np.array([1e200])}, RECORD), current, EXPECTED, Limits(1000))


@pytest.mark.parametrize("depth", [10, 900, 100_000])
def test_what_a_stranger_sent_is_shown_short_however_deep_it_is(depth: int) -> None:
    assert len(shown(nested(depth))) < 100


def test_record_as_json_can_be_screened() -> None:
    screen(Payload(CURRENT, json.loads(json.dumps(RECORD))), CURRENT, EXPECTED, LIMITS)
