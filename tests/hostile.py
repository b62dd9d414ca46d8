"""Messages of a hostile peer: real ones changed at random, crafted ones, and noise; all seeded.

What a message means is read here by other code than the product's, so that a change which happens
to be harmless is told from one that got through.
"""

from __future__ import annotations

import copy
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fedpeat.core.errors import WireError
from fedpeat.core.wire import Payload, decode, encode

__all__ = ["CRAFTED", "hostile", "is_proper_update", "meaning", "raw", "refused"]

Arrays = dict[str, np.ndarray]
MAX_DEPTH = 63
TYPES = {"F32": np.float32, "F64": np.float64, "I8": np.int8, "U8": np.uint8, "U16": np.uint16}


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**53, 2**63, 2**64, 10**300, -(10**9)),
    *(0.0, -0.0, 0.5, 1.0, 3.0, 1e-300, 1e12, 1e13, 1e308, -1e308),
    *("", "0", "a" * 64, "server", "00001.000000", "nan", "\ud800", "\x1b[2J", "x" * 5000, "../a"),
    *([], [1], ["a"], [[]], {}, {"a": 1}, {"schema": 1}, nested(10), nested(200)),
)
HEADERS: tuple[Any, ...] = (*VALUES, "F32", "BF16", "F8_E4M3", "C64", [0, 4], [4, 0], [0, 2**60])
HEADERS += ([2**40, 2**40], [0], [1] * 70, [-1], [0, 2**40])


# --- building -------------------------------------------------------------------------------------


def raw(header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a message with any header, which may claim any length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def enveloped(record: str) -> dict[str, dict[str, str]]:
    return {"__metadata__": {"fedpeat": f'{{"schema": 1, "record": {record}}}'}}


def _tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


_FOUR, _META = b"\0" * 4, enveloped("{}")
CRAFTED: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\1" * 7,
    "claims 2^64 - 1 bytes of header": raw(b"{}", length=2**64 - 1),
    "claims 100 MB of header": raw(b"{}", length=10**8),
    "claims 4 TB of tensor": raw({**_META, "a": _tensor("F32", [2**40], 0, 2**42)}, _FOUR),
    "shape overflows": raw({**_META, "a": _tensor("F32", [2**40, 2**40], 0, 4)}, _FOUR),
    "seventy axes": raw({**_META, "a": _tensor("F32", [1] * 70, 0, 4)}, _FOUR),
    "no axis": raw({**_META, "a": _tensor("F32", [], 0, 4)}, _FOUR),
    "nothing in it": raw({**_META, "a": _tensor("F32", [0, 2**40], 0, 0)}),
    "overlapping": raw(
        {**_META, "a": _tensor("F32", [1], 0, 4), "b": _tensor("F32", [1], 0, 4)}, _FOUR
    ),
    "a gap": raw({**_META, "a": _tensor("F32", [1], 4, 8)}, _FOUR * 2),
    "more bytes than tensors": raw(_META, _FOUR),
    "a name twice": raw(
        json.dumps(_META).encode()[:-1]
        + b', "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}' * 2
        + b"}",
        _FOUR,
    ),
    "two records": raw(json.dumps(_META).encode()[:-1] + b", " + json.dumps(_META).encode()[1:]),
    "bfloat16": raw({**_META, "a": _tensor("BF16", [1], 0, 2)}, b"\0\0"),
    "eight-bit floats": raw({**_META, "a": _tensor("F8_E4M3", [1], 0, 1)}, b"\0"),
    "an unknown type": raw({**_META, "a": _tensor("PICKLE", [1], 0, 4)}, _FOUR),
    "deep header": raw(b"[" * 100_000),
    "deep record": raw(enveloped('{"a":' * 100_000 + "1" + "}" * 100_000)),
    "a record of 200 levels": raw(enveloped('{"a":' * 200 + "1" + "}" * 200)),
    "a number of 5000 digits": raw(enveloped('{"server_round": ' + "9" * 5000 + "}")),
    "1e999": raw(enveloped('{"server_round": 1e999}')),
    "NaN": raw(enveloped('{"server_round": NaN}')),
    "a hundred thousand empty objects": raw(enveloped('{"held": [' + "{}," * 100_000 + "{}]}")),
    "half a surrogate in the header": raw(b'{"__metadata__": {"fedpeat": "\\ud800"}}'),
    "record is a list": raw(enveloped("[]")),
    "schema 1.0": raw({"__metadata__": {"fedpeat": '{"schema": 1.0, "record": {}}'}}),
    "schema true": raw({"__metadata__": {"fedpeat": '{"schema": true, "record": {}}'}}),
    "schema 2": raw({"__metadata__": {"fedpeat": '{"schema": 2, "record": {}}'}}),
    "no record": raw({"__metadata__": {"format": "pt"}}),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


# --- changing -------------------------------------------------------------------------------------


def hostile(honest: bytes, others: list[bytes], seed: int, count: int) -> Iterator[bytes]:
    """Yield so many messages: the crafted ones, then changes of an honest one.

    Args:
        honest: What an honest peer sends.
        others: Other messages of honest peers, to be mixed with it.
        seed: Of all choices.
        count: How many.
    """
    rng = np.random.default_rng(seed)
    yield from list(CRAFTED.values())[:count]
    for _ in range(count - len(CRAFTED)):
        change = CHANGES[rng.integers(len(CHANGES))]
        yield change(honest, others, rng)


def _bits(honest: bytes, _others: list[bytes], rng: np.random.Generator) -> bytes:
    content = bytearray(honest)
    for place in rng.integers(len(content), size=rng.integers(1, 4)):
        content[place] ^= 1 << rng.integers(8)
    return bytes(content)


def _cut(honest: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    place = int(rng.integers(len(honest)))
    other = others[rng.integers(len(others))]
    tails = (b"", rng.bytes(9), other[place:], honest[: place // 2], honest[place:] + b"\0")
    return honest[:place] + tails[rng.integers(len(tails))]


def _noise(_honest: bytes, _others: list[bytes], rng: np.random.Generator) -> bytes:
    noise = rng.bytes(int(rng.integers(200)))
    return noise if rng.random() < 0.5 else raw(noise, noise)


def _header(honest: bytes, _others: list[bytes], rng: np.random.Generator) -> bytes:
    """Change what the header says, and leave the rest."""
    length = int.from_bytes(honest[:8], "little")
    header = json.loads(honest[8 : 8 + length])
    _change_somewhere(header, HEADERS, rng)
    return raw(header, honest[8 + length :])


def _record(honest: bytes, _others: list[bytes], rng: np.random.Generator) -> bytes:
    payload = decode(honest)
    record = json.loads(json.dumps(payload.record))
    for _ in range(rng.integers(1, 3)):
        _change_somewhere(record, VALUES, rng)
    return encode(Payload(payload.arrays, record))


def _arrays(honest: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    payload = decode(honest)
    arrays = {name: array.copy() for name, array in payload.arrays.items()}
    other = decode(others[rng.integers(len(others))])
    if not arrays:
        return encode(Payload(other.arrays, payload.record))
    name = list(arrays)[rng.integers(len(arrays))]
    array = arrays[name]
    whole, real = rng.integers(2**16), rng.choice([math.nan, math.inf, 1e30, 1e-40, -3.0])
    ways: list[Callable[[], object]] = [
        lambda: array.reshape(-1).__setitem__(
            rng.integers(array.size), real if array.dtype.kind == "f" else array.dtype.type(whole)
        ),
        lambda: arrays.update({name: array.T}),
        lambda: arrays.update({name: array.reshape(-1)[:-1]}),
        lambda: arrays.update({name: array[None]}),
        lambda: arrays.update({name: array.astype(rng.choice(["f2", "f8", "i4", "?", "u2"]))}),
        lambda: arrays.update({name: np.zeros(())}),
        lambda: arrays.update({name: np.zeros((0, 7), np.float32)}),
        lambda: arrays.pop(name),
        lambda: arrays.update({f"{name}.more": arrays.pop(name)}),
        lambda: arrays.update({"x" * int(rng.integers(3000)): array}),
        lambda: arrays.update(other.arrays),
    ]
    with np.errstate(all="ignore"):
        ways[rng.integers(len(ways))]()
    return encode(Payload(arrays, payload.record))


CHANGES = (_bits, _cut, _noise, _header, _record, _record, _record, _arrays, _arrays)


def _change_somewhere(tree: Any, values: tuple[Any, ...], rng: np.random.Generator) -> None:
    """Put, drop or rename an entry somewhere in nested dicts and lists."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            break
        key = keys[rng.integers(len(keys))]
        child = tree[key]
        if not (isinstance(child, dict | list) and child) or rng.random() < 0.3:
            break
        tree = child
    value, way = copy.deepcopy(values[rng.integers(len(values))]), rng.random()
    if not keys or way < 0.1:
        _add(tree, str(value)[:40], value)
    elif way < 0.25:
        del tree[key]
    elif way < 0.35 and isinstance(tree, dict):
        tree[f"{key}x"] = tree.pop(key)
    else:
        tree[key] = value


def _add(tree: Any, key: str, value: Any) -> None:
    if isinstance(tree, dict):
        tree[key] = value
    else:
        tree.append(value)


# --- what a message means, read by other code -----------------------------------------------------


def meaning(content: bytes) -> tuple[Arrays, dict[str, Any]] | None:
    """Return tensors and record of a message; None if it is none, by a strict reading."""
    try:
        length = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        metadata = header.pop("__metadata__")
        envelope = json.loads(metadata["fedpeat"])
        record = envelope["record"]
        sides = [side for item in header.values() for side in item["shape"]]
        if not (
            _is_whole(envelope["schema"], 1, 1)
            and all(isinstance(value, str) for value in metadata.values())
            and all(_is_whole(side, 0, 2**64) for side in sides)
            and _depth(record) <= MAX_DEPTH
            and _depth(header) <= 2 * MAX_DEPTH
        ):
            return None
        arrays, place = {}, 0
        for name, item in sorted(header.items(), key=lambda i: i[1]["data_offsets"]):
            start, end = item["data_offsets"]
            if start != place or end > len(data):
                return None
            array = np.frombuffer(data[start:end], TYPES[item["dtype"]])
            arrays[name], place = array.reshape(item["shape"]), end
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return (arrays, record) if place == len(data) and isinstance(record, dict) else None


def _depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, children), default=0) if isinstance(value, dict | list) else 0


def is_proper_update(
    content: bytes,
    current: Mapping[str, np.ndarray],
    expected: Mapping[str, Any],
    *,
    codec: str,
    kept: int,
    max_examples: int,
    max_norm: float,
) -> bool:
    """Say whether a reply to a train task is one that an honest device may send."""
    read = meaning(content)
    if read is None:
        return False
    arrays, record = read
    numbers: list[Any] = [record.get(key) for key in ("first_loss", "last_loss", "mean_loss")]
    change = _change_in(arrays, current, codec, kept)
    return (
        all(type(record.get(k)) is type(v) and record.get(k) == v for k, v in expected.items())
        and _is_whole(record.get("num_examples"), 1, max_examples)
        and _is_whole(record.get("num_tokens"), 0, 2**53)
        and all(type(x) in {int, float} and abs(x) <= 1e12 for x in numbers)
        and isinstance(record.get("seconds"), str)
        and re.fullmatch(r"\d{5}\.\d{6}", record["seconds"], re.ASCII) is not None
        and change is not None
        and bool(np.isfinite(change).all())
        and float(np.linalg.norm(change)) <= max_norm
    )


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _change_in(
    arrays: Arrays, current: Mapping[str, np.ndarray], codec: str, kept: int
) -> np.ndarray | None:
    """Return by how much an update changes each entry; None if it is not written as it must be."""
    length = sum(array.size for array in current.values())
    lengths = {
        "float32": {name: (np.float32, array.shape) for name, array in current.items()},
        "bf16": {"bf16": (np.uint16, (length,))},
        "int8": {"codes": (np.int8, (length,)), "scales": (np.float32, (-(-length // 256),))},
        "topk": {"steps": (np.uint16, (kept,)), "values": (np.uint16, (kept,))},
    }[codec]
    if {n: (a.dtype.type, a.shape) for n, a in arrays.items()} != lengths:
        return None
    with np.errstate(all="ignore"):
        return READERS[codec](arrays, current, length)


def _from_float32(arrays: Arrays, current: Mapping[str, np.ndarray], _length: int) -> np.ndarray:
    pairs = [arrays[name].astype(float) - array for name, array in current.items()]
    return np.concatenate([pair.reshape(-1) for pair in pairs])


def _from_bf16(arrays: Arrays, _current: Mapping[str, np.ndarray], _length: int) -> np.ndarray:
    return (arrays["bf16"].astype(np.uint32) << 16).view(np.float32).astype(float)


def _from_int8(
    arrays: Arrays, _current: Mapping[str, np.ndarray], length: int
) -> np.ndarray | None:
    scales = arrays["scales"].astype(float)
    if (arrays["codes"] == -128).any() or not (np.isfinite(scales) & (scales >= 0)).all():
        return None
    return np.asarray(arrays["codes"] * np.repeat(scales, 256)[:length])


def _from_topk(
    arrays: Arrays, _current: Mapping[str, np.ndarray], length: int
) -> np.ndarray | None:
    places = np.cumsum(arrays["steps"].astype(int)) - 1
    if (arrays["steps"] == 0).any() or places[-1] >= length:
        return None
    change = np.zeros(length)
    change[places] = (arrays["values"].astype(np.uint32) << 16).view(np.float32)
    return change


READERS: dict[str, Callable[[Arrays, Mapping[str, np.ndarray], int], np.ndarray | None]] = {
    "float32": _from_float32,
    "bf16": _from_bf16,
    "int8": _from_int8,
    "topk": _from_topk,
}


def refused(do: Callable[[], object], kinds: tuple[type[Exception], ...] = (WireError,)) -> str:
    """Return why something is refused in one line; empty if it is not; other errors get through."""
    try:
        do()
    except kinds as error:
        return str(error) or "no reason"
    return ""
