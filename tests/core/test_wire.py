"""The wire format: what is sent comes back, and whatever else comes is a WireError."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from fedpeat.core.errors import WireError
from fedpeat.core.wire import Payload, decode, digest, encode

SMALL = encode(Payload({"w": np.array([1.0, 2.0], np.float32)}, {"num_examples": 3}))


def file_of(header: object, data: bytes = b"") -> bytes:
    """Return a safetensors file with a header written by hand."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def message(envelope: str) -> bytes:
    """Return a message without arrays whose envelope is written by hand."""
    return file_of({"__metadata__": {"fedpeat": envelope}})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_arrays_of_every_type_and_shape_come_back_as_they_were(
    dtype: str, shape: tuple[int, ...]
) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    back = decode(encode(Payload({"layers.0.w": array}))).arrays["layers.0.w"]
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)


def test_transposed_and_sliced_arrays_come_back_with_their_values() -> None:
    matrix = np.arange(6.0).reshape(2, 3)
    back = decode(encode(Payload({"t": matrix.T, "s": matrix[:, ::2]}))).arrays
    np.testing.assert_array_equal(back["t"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(back["s"], [[0, 2], [3, 5]])


def test_nan_in_an_array_travels_since_only_its_reader_knows_what_it_means() -> None:
    back = decode(encode(Payload({"w": np.array([np.nan, -np.inf])}))).arrays["w"]
    np.testing.assert_array_equal(back, [np.nan, -np.inf])


def test_digest_is_that_of_names_types_shapes_and_values_in_any_order() -> None:
    one = {"a": np.arange(4.0), "b": np.ones((2, 3), np.float32)}
    assert (
        digest(one)
        == digest(dict(reversed(one.items())))
        == digest(decode(encode(Payload(one))).arrays)
    )
    others = [
        {"a": one["a"]},
        {"a": one["a"], "c": one["b"]},
        {"a": one["a"].reshape(2, 2), "b": one["b"]},
        {"a": one["a"].astype(np.float32), "b": one["b"]},
        {"a": one["a"] + 1e-15, "b": one["b"]},
    ]
    assert len({digest(arrays) for arrays in [one, *others]}) == 6


def test_record_comes_back_equal() -> None:
    record = {"loss": 0.1, "n": 2**60, "name": "site-ü \u2028", "none": None, "list": [True, {}]}
    assert decode(encode(Payload({}, record))).record == record


@pytest.mark.parametrize("length", range(len(SMALL)))
def test_message_cut_short_anywhere_is_refused(length: int) -> None:
    with pytest.raises(WireError):
        decode(SMALL[:length])


@pytest.mark.parametrize("position", range(len(SMALL)))
def test_flipped_bits_bring_a_payload_or_a_wire_error_and_nothing_else(position: int) -> None:
    for bit in range(8):
        damaged = bytearray(SMALL)
        damaged[position] ^= 1 << bit
        with contextlib.suppress(WireError):
            assert isinstance(decode(bytes(damaged)), Payload)


def test_random_bytes_are_refused() -> None:
    rng = np.random.default_rng(0)
    for length in range(200):
        with pytest.raises(WireError):
            decode(rng.bytes(length))


@pytest.mark.parametrize("length", [len(SMALL), 2**31, 2**63, 2**64 - 1])
def test_header_that_claims_to_be_longer_than_the_message_is_refused(length: int) -> None:
    with pytest.raises(WireError):
        decode(struct.pack("<Q", length) + SMALL[8:])


@pytest.mark.parametrize("schema", ["2", "0", "null", '"1"', "[]"])
def test_message_of_another_schema_is_refused_by_name(schema: str) -> None:
    with pytest.raises(WireError, match="schema must be 1, got"):
        decode(message(f'{{"schema": {schema}, "record": {{}}}}'))


@pytest.mark.parametrize(
    "envelope",
    ["", "{", "not json", "3", "null", "[]", "{}", '{"schema": 1}', '{"record": {}}', "\x00"],
)
def test_envelope_that_is_not_the_json_we_write_is_refused(envelope: str) -> None:
    with pytest.raises(WireError):
        decode(message(envelope))


@pytest.mark.parametrize("record", ["null", "[]", "3", '"text"'])
def test_record_that_is_no_mapping_is_refused(record: str) -> None:
    with pytest.raises(WireError, match="record must be a mapping, got"):
        decode(message(f'{{"schema": 1, "record": {record}}}'))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_record_with_a_number_that_is_not_finite_is_refused_by_the_receiver(number: str) -> None:
    with pytest.raises(WireError):
        decode(message(f'{{"schema": 1, "record": {{"a": [{number}]}}}}'))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_record_with_a_number_that_is_not_finite_is_refused_by_the_sender(number: float) -> None:
    with pytest.raises(WireError, match="plain finite JSON"):
        encode(Payload({}, {"a": [{"b": number}]}))


@pytest.mark.parametrize("depth", [900, 1_000, 100_000])
def test_nested_bomb_ends_in_a_wire_error_at_worst(depth: int) -> None:
    try:
        decode(message('{"schema": 1, "record": {"a": ' + "[" * depth + "]" * depth + "}}"))
    except WireError:
        return
    assert depth == 900


def test_nested_bomb_is_not_sent_either() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(WireError):
        encode(Payload({}, {"a": nested}))


@pytest.mark.parametrize(
    ("dtype", "shape", "num_bytes"),
    [
        ("F32", [2**62, 4], 0),
        ("F32", [0, 2**63], 0),
        ("F32", [0, 2**62], 0),
        ("F32", [1] * 100, 4),
        ("F32", [1, -1], 4),
        ("F32", [10**6], 4),
        ("BF16", [2], 4),
        ("PICKLE", [2], 4),
    ],
)
def test_array_that_lies_about_itself_is_refused(
    dtype: str, shape: list[int], num_bytes: int
) -> None:
    header = {
        "__metadata__": {"fedpeat": '{"schema": 1, "record": {}}'},
        "w": {"dtype": dtype, "shape": shape, "data_offsets": [0, num_bytes]},
    }
    with pytest.raises(WireError):
        decode(file_of(header, bytes(num_bytes)))


def test_safetensors_file_of_somebody_else_is_refused() -> None:
    with pytest.raises(WireError, match="not a fedpeat message"):
        decode(save({"w": np.zeros(2)}))


@pytest.mark.parametrize("array", [np.array([object()]), np.array(["text"]), np.zeros(2, complex)])
def test_array_of_something_else_than_real_numbers_is_not_sent(array: np.ndarray) -> None:
    with pytest.raises(WireError, match="arrays must be"):
        encode(Payload({"w": array}))


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", np.float32(1), object()])
def test_record_of_something_else_than_plain_data_is_not_sent(value: object) -> None:
    with pytest.raises(WireError, match="plain finite JSON"):
        encode(Payload({}, {"value": value}))
