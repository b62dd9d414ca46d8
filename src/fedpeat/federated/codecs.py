"""How a device puts its update into fewer bytes, and how the server reads it. NumPy only.

What training changed is laid out as one vector, tensor after tensor in the order of their names; a
codec turns the vector into arrays and back. The server gave the device what it started from, so it
knows how long the vector is, and which arrays of which type and shape must come: a message has no
sizes of its own to be believed.

int8 and topk lose much of a single update. What a device could not say in one round it adds to the
next (error feedback), so that nothing is lost for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, UInt16

from fedpeat.adapter.lora import State
from fedpeat.core.errors import AdapterError, WireError

__all__ = ["CODECS", "Codec", "UpdateCodec", "UpdateEncoder", "decode_update"]

Vector = Float32[np.ndarray, " n"]
Arrays = dict[str, np.ndarray]

_BLOCK = 256  # numbers of int8 that share a scale
_MOST = 127
_LARGEST_BF16 = np.uint32(0x7F7F0000).view(np.float32)
_LONGEST_STEP = 2**16 - 1
_NOTHING: tuple[int, str, np.ndarray | None] = (0, "", None)
_ROUNDING = 1e-9  # a tenth of 20 is 2, not a little more


@dataclass(frozen=True)
class Codec:
    """A way to write a vector.

    Attributes:
        encode: (vector, kept ratio) -> arrays.
        decode: (arrays, length, kept ratio) -> vector, or WireError; the arrays are a stranger's.
        feedback: Whether what got lost is added to the next round's update.
    """

    encode: Callable[[Vector, float], Arrays]
    decode: Callable[[Mapping[str, np.ndarray], int, float], Vector]
    feedback: bool


@dataclass(frozen=True)
class UpdateCodec:
    """How a round's updates travel, as the server tells its devices.

    Attributes:
        name: Name in ``CODECS``.
        kept_ratio: Share of the entries that topk sends, in (0, 1].
        feedback: Whether what got lost may be added to the next update, if the codec does so; not
            where entries mean something else from round to round.
    """

    name: str = "float32"
    kept_ratio: float = 0.1
    feedback: bool = True

    @classmethod
    def read(cls, record: object) -> UpdateCodec:
        """Return what a server wrote, every part there and of its type.

        Raises:
            WireError: If it is not a codec.
        """
        if not isinstance(record, dict) or record.keys() != {"name", "kept_ratio", "feedback"}:
            raise WireError(f"codec must be name, kept_ratio and feedback, got {record!r:.80}")
        name, kept_ratio, feedback = record["name"], record["kept_ratio"], record["feedback"]
        if not isinstance(name, str) or name not in CODECS:
            raise WireError(f"codec must be one of {', '.join(CODECS)}, got {name!r:.40}")
        if type(kept_ratio) not in {int, float} or not 0 < kept_ratio <= 1:
            raise WireError(f"kept_ratio must be a number in (0, 1], got {kept_ratio!r:.40}")
        if type(feedback) is not bool:
            raise WireError(f"feedback must be true or false, got {feedback!r:.40}")
        return cls(name, float(kept_ratio), feedback)

    @property
    def feeds_back(self) -> bool:
        """Whether devices keep what got lost."""
        codec = CODECS[self.name]
        return codec is not None and codec.feedback and self.feedback


@dataclass
class UpdateEncoder:
    """The device's side, with what earlier rounds left unsaid.

    A round that is asked again, since the server lost the answer, is answered the same.

    Attributes:
        key: What the residuals belong to; they are dropped where it changes.
        residuals: What is left unsaid of each part of the adapter, by the part's name.

    Source:
        Seide et al. (2014), 1-bit stochastic gradient descent; Karimireddy et al. (2019), Error
        feedback fixes SignSGD and other gradient compression schemes, arXiv:1901.09847.
    """

    key: str = ""
    residuals: dict[str, np.ndarray] = field(default_factory=dict)
    _before: tuple[int, str, np.ndarray | None] = field(default=_NOTHING, init=False)

    def encode(
        self,
        new: State,
        start: State,
        codec: UpdateCodec,
        *,
        key: str,
        part: str,
        server_round: int,
    ) -> Arrays:
        """Return what is sent of an update.

        Args:
            new: The tensors as they were tuned.
            start: The same tensors as they were given.
            codec: How to send them.
            key: Names all that entries mean: the emulator and the rank.
            part: Name of the part of the adapter that was tuned.
            server_round: The round.

        Raises:
            AdapterError: If a value is not finite; the residual stays as it was.
        """
        written = CODECS[codec.name]
        if written is None:
            return dict(new)
        self._start_round(f"{key}/{codec.name}/{codec.kept_ratio}", part, server_round)
        vector = _vector(new) - _vector(start)
        residual = self.residuals.get(part)
        if codec.feeds_back and residual is not None and len(residual) == len(vector):
            vector = vector + residual
        if not np.isfinite(vector).all():
            raise AdapterError("the tuned adapter has values that are not finite; nothing is sent")
        arrays = written.encode(vector, codec.kept_ratio)
        if codec.feeds_back:
            self._before = (server_round, part, residual)
            self.residuals[part] = vector - written.decode(arrays, len(vector), codec.kept_ratio)
        return arrays

    def _start_round(self, key: str, part: str, server_round: int) -> None:
        if key != self.key:
            self.key, self.residuals, self._before = key, {}, _NOTHING
        if self._before[:2] == (server_round, part):
            residual = self._before[2]
            self.residuals.pop(part, None)
            if residual is not None:
                self.residuals[part] = residual


def decode_update(
    arrays: Mapping[str, np.ndarray], start: State, codec: UpdateCodec
) -> Mapping[str, np.ndarray]:
    """Return the tensors that a device's arrays stand for.

    Those of float32 are returned as they came, to be screened with everything else.

    Args:
        arrays: What came.
        start: What the device was given of what it tuned.
        codec: How it was told to send.

    Raises:
        WireError: If the arrays are not what the codec writes for tensors of these shapes.
    """
    written = CODECS[codec.name]
    if written is None:
        return arrays
    vector = _vector(start)
    with np.errstate(over="ignore"):  # the screening refuses what is not finite
        vector = vector + written.decode(arrays, len(vector), codec.kept_ratio)
    ends = np.cumsum([start[name].size for name in sorted(start)])
    pieces = zip(sorted(start), np.split(vector, ends[:-1]), strict=True)
    tensors = {name: piece.reshape(start[name].shape) for name, piece in pieces}
    return {name: tensors[name].astype(like.dtype) for name, like in start.items()}


def _vector(tensors: State) -> Vector:
    return np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)], dtype=np.float32)


# --- bfloat16 -------------------------------------------------------------------------------------


def _rounded(vector: Vector) -> UInt16[np.ndarray, " n"]:
    """Return the upper halves of numbers, rounded to the nearest, ties to even."""
    bits = np.clip(vector, -_LARGEST_BF16, _LARGEST_BF16).view(np.uint32)
    halves: UInt16[np.ndarray, " n"] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return halves


def _widened(halves: UInt16[np.ndarray, " n"]) -> Vector:
    vector: Vector = (halves.astype(np.uint32) << 16).view(np.float32)
    if not np.isfinite(vector).all():
        raise WireError("an update in bf16 has values that are not finite")
    return vector


def _to_bf16(vector: Vector, _kept_ratio: float) -> Arrays:
    return {"bf16": _rounded(vector)}


def _from_bf16(arrays: Mapping[str, np.ndarray], length: int, _kept_ratio: float) -> Vector:
    _require(arrays, bf16=(np.uint16, length))
    return _widened(arrays["bf16"])


# --- int8 -----------------------------------------------------------------------------------------


def _to_int8(vector: Vector, _kept_ratio: float) -> Arrays:
    """Return whole numbers in [-127, 127] and the scale of each block.

    Source:
        Dettmers et al. (2022), 8-bit optimizers via block-wise quantization, for blocks.
    """
    blocks = _in_blocks(vector)
    scales = np.abs(blocks).max(1) / np.float32(_MOST)
    steps = np.divide(blocks, scales[:, None], out=np.zeros_like(blocks), where=scales[:, None] > 0)
    codes = np.clip(np.rint(steps), -_MOST, _MOST).astype(np.int8)
    return {"codes": codes.reshape(-1)[: len(vector)], "scales": scales}


def _from_int8(arrays: Mapping[str, np.ndarray], length: int, _kept_ratio: float) -> Vector:
    _require(arrays, codes=(np.int8, length), scales=(np.float32, math.ceil(length / _BLOCK)))
    codes, scales = arrays["codes"], arrays["scales"]
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise WireError("scales of an update in int8 must be finite and at least 0")
    if (codes < -_MOST).any():
        raise WireError(f"an update in int8 must be in [-{_MOST}, {_MOST}]")
    with np.errstate(over="ignore"):
        vector: Vector = (_in_blocks(codes.astype(np.float32)) * scales[:, None]).reshape(-1)
    return vector[:length]


def _in_blocks(vector: Vector) -> Float32[np.ndarray, "blocks 256"]:
    padded: Vector = np.pad(vector, (0, -len(vector) % _BLOCK))
    return padded.reshape(-1, _BLOCK)


# --- the largest entries --------------------------------------------------------------------------


def _to_topk(vector: Vector, kept_ratio: float) -> Arrays:
    """Return the largest entries, rounded to bf16, and the steps from each to the next.

    Source:
        Stich et al. (2018), Sparsified SGD with memory.
    """
    places = _largest(vector, _num_kept(len(vector), kept_ratio))
    return {"steps": _steps(places), "values": _rounded(vector[places])}


def _from_topk(arrays: Mapping[str, np.ndarray], length: int, kept_ratio: float) -> Vector:
    num_kept = _num_kept(length, kept_ratio)
    steps = arrays.get("steps", np.zeros(0))
    most = num_kept + length // _LONGEST_STEP
    if steps.ndim != 1 or not num_kept <= len(steps) <= most:
        raise WireError(
            f"steps of an update must be [{num_kept} to {most}], got {list(steps.shape)}"
        )
    _require(arrays, steps=(np.uint16, len(steps)), values=(np.uint16, num_kept))
    ends = np.cumsum(np.where(steps == 0, _LONGEST_STEP, steps), dtype=np.int64)
    places = ends[steps > 0] - 1
    if len(places) != num_kept or steps[-1] == 0 or places[-1] >= length:
        raise WireError(f"steps of an update must lead to {num_kept} of {length} entries")
    vector = np.zeros(length, np.float32)
    vector[places] = _widened(arrays["values"])
    return vector


def _num_kept(length: int, kept_ratio: float) -> int:
    return max(1, math.ceil(kept_ratio * length - _ROUNDING))


def _largest(vector: Vector, num_kept: int) -> np.ndarray:
    """Return the places of the largest entries, rising; of equal ones the first."""
    sizes = np.abs(vector)
    least = np.partition(sizes, len(sizes) - num_kept)[len(sizes) - num_kept]
    above, equal = np.flatnonzero(sizes > least), np.flatnonzero(sizes == least)
    return np.sort(np.concatenate([above, equal[: num_kept - len(above)]]))


def _steps(places: np.ndarray) -> UInt16[np.ndarray, " m"]:
    """Return the distance from each place to the next; a 0 is the longest step, to no entry."""
    distances = np.diff(places, prepend=-1)
    longest = (distances - 1) // _LONGEST_STEP
    ends = np.cumsum(longest + 1) - 1
    steps: UInt16[np.ndarray, " m"] = np.zeros(ends[-1] + 1, np.uint16)
    steps[ends] = distances - longest * _LONGEST_STEP
    return steps


def _require(arrays: Mapping[str, np.ndarray], **wanted: tuple[type, int]) -> None:
    """Refuse arrays that have not these names, types and lengths."""
    if arrays.keys() != wanted.keys():
        raise WireError(
            f"an update must have the arrays {', '.join(wanted)}, got {sorted(arrays)!r:.80}"
        )
    for name, (dtype, length) in wanted.items():
        got = arrays[name]
        if got.dtype != dtype or got.shape != (length,):
            raise WireError(
                f"{name} of an update must be {np.dtype(dtype)} [{length}], "
                f"got {got.dtype} {list(got.shape)}"
            )


CODECS: dict[str, Codec | None] = {
    "float32": None,  # the tensors as they are
    "bf16": Codec(_to_bf16, _from_bf16, feedback=False),
    "int8": Codec(_to_int8, _from_int8, feedback=True),
    "topk": Codec(_to_topk, _from_topk, feedback=True),
}
