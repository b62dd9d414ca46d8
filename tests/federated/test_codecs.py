"""Codecs of updates: what they send, what they keep for later, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fedpeat.core.errors import AdapterError, WireError
from fedpeat.federated.codecs import CODECS, Codec, UpdateCodec, UpdateEncoder, decode_update

State = dict[str, np.ndarray]
SHAPES = {"b": (3, 100), "a": (70, 4), "scalar": (), "c": (1,)}
LENGTH = 300 + 280 + 1 + 1
NAMES = [name for name, codec in CODECS.items() if codec is not None]


def state(seed: int, size: float = 1.0) -> State:
    rng = np.random.default_rng(seed)
    return {n: np.asarray(rng.normal(0, size, s), np.float32) for n, s in SHAPES.items()}


def plus(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> State:
    return {name: np.asarray(array + other[name]) for name, array in one.items()}


def codec_of(name: str) -> Codec:
    codec = CODECS[name]
    assert codec is not None
    return codec


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def there_and_back(name: str, values: np.ndarray, kept_ratio: float = 1.0) -> np.ndarray:
    codec = codec_of(name)
    return codec.decode(codec.encode(values, kept_ratio), len(values), kept_ratio)


def encode(
    encoder: UpdateEncoder, new: State, start: State, codec: UpdateCodec, **changes: Any
) -> State:
    place: dict[str, Any] = {"key": "emulator", "part": "all", "server_round": 1, **changes}
    return encoder.encode(new, start, codec, **place)


# --- what is sent -------------------------------------------------------------------------------


def test_bf16_rounds_as_torch_does() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], vector(0, -0.0, 1.00390625, 1e-45, -1)])
    values = values[np.abs(values) < 3.38e38]  # torch rounds the very largest up to infinity
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert there_and_back("bf16", values).tobytes() == expected.tobytes()


def test_bf16_of_the_largest_number_is_finite() -> None:
    largest = float(np.finfo(np.float32).max)
    assert there_and_back("bf16", vector(largest, -largest)) == pytest.approx(
        largest * vector(1, -1), rel=0.01
    )


def test_int8_has_a_scale_for_each_block_of_256() -> None:
    values = np.concatenate([np.linspace(-127, 127, 256), [0.5, -1.0, 0.003]]).astype(np.float32)
    arrays = codec_of("int8").encode(values, 1.0)
    np.testing.assert_allclose(arrays["scales"], [1.0, 1 / 127], rtol=1e-6)
    assert arrays["codes"][[0, 255, 256, 257, 258]].tolist() == [-127, 127, 64, -127, 0]
    back = there_and_back("int8", values)
    assert np.abs(back - values)[:256].max() <= 0.5
    assert np.abs(back - values)[256:].max() <= 0.5 / 127


def test_int8_of_zeros_and_of_the_smallest_numbers_is_finite() -> None:
    tiny = np.float32(1e-45)
    assert there_and_back("int8", np.zeros(300, np.float32)).tolist() == [0.0] * 300
    assert np.abs(there_and_back("int8", np.full(300, tiny))).max() <= 127 * tiny


def test_topk_sends_the_largest_and_of_equal_ones_the_first() -> None:
    assert there_and_back("topk", vector(3, -5, 0, 1), 0.5).tolist() == [3, -5, 0, 0]
    assert there_and_back("topk", vector(1, 2, -1, 1, 2), 0.6).tolist() == [1, 2, 0, 0, 2]
    assert there_and_back("topk", vector(0, 0, 0, 0), 0.5).tolist() == [0] * 4
    assert there_and_back("topk", vector(*range(20)), 0.1).tolist() == [0.0] * 18 + [18, 19]
    assert there_and_back("topk", vector(1, 2), 1e-9).tolist() == [0, 2]


@pytest.mark.parametrize(
    "places",
    [[0], [65534], [65535], [65536], [131069, 131070], [0, 65535, 131071], [199_999]],
    ids=str,
)
def test_topk_finds_entries_however_far_apart_they_are(places: list[int]) -> None:
    values = np.zeros(200_000, np.float32)
    values[places] = 1.0
    ratio = len(places) / len(values)
    np.testing.assert_array_equal(there_and_back("topk", values, ratio), values)


@pytest.mark.parametrize(
    ("name", "num_bytes"), [("bf16", 2.0), ("int8", 1 + 4 / 256), ("topk", 0.4)]
)
def test_bytes_of_an_entry(name: str, num_bytes: float) -> None:
    values = np.random.default_rng(0).normal(size=25_600).astype(np.float32)
    arrays = codec_of(name).encode(values, 0.1)
    assert sum(a.nbytes for a in arrays.values()) == pytest.approx(
        num_bytes * len(values), rel=1e-3
    )


@pytest.mark.parametrize("name", CODECS)
def test_what_comes_back_has_the_names_shapes_and_types_of_what_was_given(name: str) -> None:
    start, change = state(0), state(1, 0.01)
    codec = UpdateCodec(name, 1.0)
    arrays = encode(UpdateEncoder(), plus(start, change), start, codec)
    got = decode_update(arrays, start, codec)
    assert {n: (a.shape, a.dtype) for n, a in got.items()} == {
        n: (s, np.dtype(np.float32)) for n, s in SHAPES.items()
    }
    for tensor, array in got.items():
        np.testing.assert_allclose(array, start[tensor] + change[tensor], atol=2e-4)


def test_plain_float32_is_sent_bit_for_bit_under_its_own_names() -> None:
    new = state(1)
    arrays = encode(UpdateEncoder(), new, state(0), UpdateCodec())
    assert {n: a.tobytes() for n, a in arrays.items()} == {n: a.tobytes() for n, a in new.items()}


def test_the_change_is_what_is_rounded_and_not_the_value() -> None:
    start, step = {"w": vector(1000.0)}, {"w": vector(1000.25)}
    codec = UpdateCodec("bf16")  # has 8 bits: 1000.25 alone would become 1000
    arrays = encode(UpdateEncoder(), step, start, codec)
    assert decode_update(arrays, start, codec)["w"].tolist() == [1000.25]


# --- error feedback -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "topk"])
def test_what_was_sent_and_what_is_left_add_up_to_what_was_tuned(name: str) -> None:
    start, codec, encoder = state(0), UpdateCodec(name, 0.1), UpdateEncoder()
    sent = tuned = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    for server_round in range(1, 6):
        change = state(server_round, 0.01)
        arrays = encode(encoder, plus(start, change), start, codec, server_round=server_round)
        got = decode_update(arrays, start, codec)
        sent = {n: np.asarray(sent[n] + got[n] - start[n]) for n in SHAPES}
        tuned = plus(tuned, change)
    left = np.concatenate([(tuned[n] - sent[n]).reshape(-1) for n in sorted(SHAPES)])
    assert np.abs(left).max() > 1e-4
    np.testing.assert_allclose(encoder.residuals["all"], left, atol=1e-5)


@pytest.mark.parametrize(("feedback", "moved"), [(True, [True, True]), (False, [True, False])])
def test_with_feedback_alone_a_small_entry_gets_its_turn(feedback: bool, moved: list[bool]) -> None:  # noqa: FBT001
    start, codec = {"w": vector(0, 0)}, UpdateCodec("topk", 0.5, feedback=feedback)
    encoder, total = UpdateEncoder(), vector(0, 0)
    for server_round in range(1, 13):  # 0.1 a round outgrows 1 in the eleventh
        arrays = encode(encoder, {"w": vector(1, 0.1)}, start, codec, server_round=server_round)
        total += decode_update(arrays, start, codec)["w"]
    assert (total > 0).tolist() == moved


def two_rounds(encoder: UpdateEncoder, codec: UpdateCodec, **second: Any) -> State:
    start = state(0)
    encode(encoder, plus(start, state(1)), start, codec)
    return encode(encoder, plus(start, state(2)), start, codec, **{"server_round": 2, **second})


def same(one: State, other: State) -> bool:
    return {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in other.items()}


@pytest.mark.parametrize(
    ("second", "drops"),
    [
        ({}, False),
        ({"key": "another emulator"}, True),
        ({"part": "lora_B"}, True),
        ({"codec": UpdateCodec("topk", 0.2)}, True),
        ({"codec": UpdateCodec("topk", 0.1, feedback=False)}, True),
    ],
    ids=["same", "emulator", "part", "codec", "no feedback"],
)
def test_a_residual_is_for_what_it_was_made_of_alone(second: dict[str, Any], drops: bool) -> None:  # noqa: FBT001
    codec, start = UpdateCodec("topk", 0.1), state(0)
    changed = dict(second)
    later = changed.pop("codec", codec)
    encoder = UpdateEncoder()
    encode(encoder, plus(start, state(1)), start, codec)
    got = encode(encoder, plus(start, state(2)), start, later, **{"server_round": 2, **changed})
    fresh = encode(UpdateEncoder(), plus(start, state(2)), start, later, **changed)
    assert same(got, fresh) == drops


def test_each_part_of_the_adapter_has_a_residual_of_its_own() -> None:
    codec, start, encoder = UpdateCodec("topk", 0.1), state(0), UpdateEncoder()
    for server_round, part in enumerate(["lora_B", "lora_A"], 1):
        new = plus(start, state(server_round))
        encode(encoder, new, start, codec, part=part, server_round=server_round)
    alone = UpdateEncoder()
    encode(alone, plus(start, state(1)), start, codec, part="lora_B")
    third = plus(start, state(3))
    got, expected = (
        encode(e, third, start, codec, part="lora_B", server_round=3) for e in (encoder, alone)
    )
    assert same(got, expected)


def test_an_adapter_of_another_size_drops_the_residual() -> None:
    codec, encoder = UpdateCodec("int8"), UpdateEncoder()
    encode(encoder, {"w": vector(1, 2, 3.1)}, {"w": vector(0, 0, 0)}, codec)
    encode(encoder, {"w": vector(1, 2)}, {"w": vector(0, 0)}, codec, server_round=2)
    assert len(encoder.residuals["all"]) == 2


@pytest.mark.parametrize("name", ["int8", "topk"])
def test_a_round_that_is_asked_again_is_answered_the_same(name: str) -> None:
    codec, encoder, start = UpdateCodec(name), UpdateEncoder(), state(0)
    first = two_rounds(encoder, codec)
    left = encoder.residuals["all"].copy()
    again = encode(encoder, plus(start, state(2)), start, codec, server_round=2)
    assert same(first, again)
    np.testing.assert_array_equal(encoder.residuals["all"], left)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_not_sent_and_spoils_nothing(
    name: str, value: float
) -> None:
    codec, encoder, start = UpdateCodec(name), UpdateEncoder(), state(0)
    encode(encoder, plus(start, state(1)), start, codec)
    before = {n: a.copy() for n, a in encoder.residuals.items()}
    broken = state(2)
    broken["a"][5, 1] = value
    for _ in range(2):
        with pytest.raises(AdapterError, match="values that are not finite; nothing is sent"):
            encode(encoder, broken, start, codec, server_round=2)
    assert same(before, encoder.residuals)


def test_bf16_keeps_nothing() -> None:
    encoder = UpdateEncoder()
    two_rounds(encoder, UpdateCodec("bf16"))
    assert encoder.residuals == {}


# --- what is refused ----------------------------------------------------------------------------

Change = Callable[[State], object]


def put(name: str, array: object) -> Change:
    return lambda arrays: arrays.__setitem__(name, np.asarray(array))


def entry(name: str, place: int, value: float) -> Change:
    return lambda arrays: arrays[name].__setitem__(place, value)


def plain_tensors(arrays: State) -> None:
    arrays.clear()
    arrays.update(state(0))


BF16_NAN, BF16_INF = 0x7FC0, 0xFF80
REFUSED: dict[str, tuple[str, Change, str]] = {
    "bf16: NaN": ("bf16", entry("bf16", 7, BF16_NAN), "bf16 has values that are not finite"),
    "bf16: infinite": ("bf16", entry("bf16", 7, BF16_INF), "bf16 has values that are not finite"),
    "bf16: too short": (
        "bf16",
        lambda a: put("bf16", a["bf16"][:-1])(a),
        r"uint16 \[582\], got uint16 \[581\]",
    ),
    "bf16: too long": (
        "bf16",
        put("bf16", np.zeros(583, np.uint16)),
        r"got uint16 \[583\]",
    ),
    "bf16: another shape": (
        "bf16",
        lambda a: put("bf16", a["bf16"].reshape(1, -1))(a),
        r"got uint16 \[1, 582\]",
    ),
    "bf16: signed": ("bf16", lambda a: put("bf16", a["bf16"].view(np.int16))(a), "got int16"),
    "bf16: no arrays": ("bf16", lambda a: a.clear(), r"must have the arrays bf16, got \[\]"),
    "bf16: plain float32": (
        "bf16",
        plain_tensors,
        "must have the arrays bf16",
    ),
    "int8: one array more": ("int8", put("more", 1), "must have the arrays codes, scales"),
    "int8: one array less": (
        "int8",
        lambda a: a.pop("scales"),
        "must have the arrays codes, scales",
    ),
    "int8: -128": ("int8", entry("codes", 9, -128), r"int8 must be in \[-127, 127\]"),
    "int8: unsigned": (
        "int8",
        lambda a: put("codes", a["codes"].view(np.uint8))(a),
        "codes .* got uint8",
    ),
    "int8: a scale is NaN": (
        "int8",
        entry("scales", 1, math.nan),
        "scales .* finite and at least 0",
    ),
    "int8: a scale is infinite": (
        "int8",
        entry("scales", 1, math.inf),
        "scales .* finite and at least 0",
    ),
    "int8: a scale is negative": (
        "int8",
        entry("scales", 1, -1.0),
        "scales .* finite and at least 0",
    ),
    "int8: too few scales": (
        "int8",
        lambda a: put("scales", a["scales"][:2])(a),
        r"scales .* float32 \[3\], got",
    ),
    "int8: float64 scales": (
        "int8",
        lambda a: put("scales", a["scales"].astype(float))(a),
        "got float64",
    ),
    "topk: no steps": (
        "topk",
        lambda a: a.pop("steps"),
        r"steps of an update must be \[59 to 59\]",
    ),
    "topk: steps without axis": ("topk", put("steps", np.uint16(1)), r"steps .* got \[\]"),
    "topk: too many steps": ("topk", put("steps", np.ones(60, np.uint16)), r"steps .* got \[60\]"),
    "topk: past the end": (
        "topk",
        put("steps", np.full(59, 65535, np.uint16)),
        "must lead to 59 of 582",
    ),
    "topk: one past the end": (
        "topk",
        lambda a: entry("steps", 0, a["steps"][0] + 582 - a["steps"].sum() + 1)(a),
        "must lead to 59 of 582",
    ),
    "topk: a step to nowhere": ("topk", entry("steps", 3, 0), "must lead to 59 of 582"),
    "topk: ends nowhere": ("topk", entry("steps", -1, 0), "must lead to 59 of 582"),
    "topk: steps of float": (
        "topk",
        lambda a: put("steps", a["steps"].astype(np.float32))(a),
        "got float32",
    ),
    "topk: too few values": ("topk", lambda a: put("values", a["values"][:-1])(a), "got uint16"),
    "topk: a value is NaN": ("topk", entry("values", 0, BF16_NAN), "values that are not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_no_codec_writes_are_refused(case: str) -> None:
    name, change, reason = REFUSED[case]
    codec, start = UpdateCodec(name, 0.1), state(0)
    arrays = {n: a.copy() for n, a in encode(UpdateEncoder(), state(1), start, codec).items()}
    decode_update(arrays, start, codec)
    change(arrays)
    with pytest.raises(WireError, match=reason) as error:
        decode_update(arrays, start, codec)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "steps", [[0, 65535], [3, 4], [5, 0]], ids=["past the end", "too many", "an end of its own"]
)
def test_topk_refuses_steps_that_lead_elsewhere_where_longest_steps_may_be(
    steps: list[int],
) -> None:
    length = 70_000
    arrays = {"steps": np.array(steps, np.uint16), "values": np.zeros(1, np.uint16)}
    with pytest.raises(WireError, match="must lead to 1 of 70000 entries"):
        codec_of("topk").decode(arrays, length, 1e-9)


def test_int8_that_overflows_is_left_to_the_screening() -> None:
    arrays: State = {"codes": np.full(3, 127, np.int8), "scales": np.full(1, 3e38, np.float32)}
    got = decode_update(arrays, {"w": np.zeros(3, np.float32)}, UpdateCodec("int8"))
    assert np.isinf(got["w"]).all()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"name": "zip"}, "codec must be one of float32, bf16, int8, topk, got 'zip'"),
        ({"name": ["topk"]}, "codec must be one of"),
        ({"kept_ratio": 0}, r"kept_ratio must be a number in \(0, 1\], got 0"),
        ({"kept_ratio": 1.1}, "kept_ratio"),
        ({"kept_ratio": math.nan}, "kept_ratio"),
        ({"kept_ratio": "0.1"}, "kept_ratio"),
        ({"kept_ratio": True}, "kept_ratio"),
        ({"feedback": 1}, "feedback must be true or false, got 1"),
        ({"more": 1}, "codec must be name, kept_ratio and feedback"),
    ],
)
def test_a_codec_that_is_none_is_refused(record: dict[str, Any], reason: str) -> None:
    proper = {"name": "topk", "kept_ratio": 0.5, "feedback": True}
    assert UpdateCodec.read(proper) == UpdateCodec("topk", 0.5)
    with pytest.raises(WireError, match=reason):
        UpdateCodec.read({**proper, **record})
    with pytest.raises(WireError, match="codec must be name"):
        UpdateCodec.read([proper])
