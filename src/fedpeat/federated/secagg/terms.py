"""What all devices of a round agree on before any of them shares a secret. No crypto here.

Each device signs the hash of these terms with its keys of the round and takes no neighbour that
signed other ones. So the server cannot tell one device other bits, another clip range or another
adapter than the rest, to make its update stand out of the sum.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedpeat.core.errors import WireError
from fedpeat.federated.secagg.ring import Quantiser

__all__ = ["PROTOCOL", "SECURE_KEY", "Terms", "read_terms", "work_digest"]

PROTOCOL = "fedpeat-secagg-1"
SECURE_KEY = "secure"
"""Under this key of its record a train message has what it says for secure aggregation."""

_COMMON = ("settings", "tuned", "num_steps", "first_step", "rank")
_MAX_TEXT = 128
_MAX_EMULATORS = 64
_MAX_BITS = 32
_MAX_SIZE = 2**32


@dataclass(frozen=True)
class Terms:
    """The terms of one round.

    Attributes:
        run: Names the run; random.
        session: Names this try at the round; random.
        server_round: The round.
        cohort_size: Devices that are asked.
        threshold_ratio: Share of a neighbourhood that opens a secret.
        num_neighbours: Neighbours of each device; everybody if there are no more.
        clip_range: Values beyond it are clipped on the device.
        num_bits: Bits of a value.
        max_examples: Most examples that a device may weigh.
        clip_norm: Largest Euclidean norm of a device's change; None for no bound.
        adapter: Hash of the adapter that all start from.
        work: Hash of how all train, as ``work_digest`` makes it.
        emulators: Hashes of the emulators that may be tuned on, in order.
    """

    run: str
    session: str
    server_round: int
    cohort_size: int
    threshold_ratio: float
    num_neighbours: int
    clip_range: float
    num_bits: int
    max_examples: int
    clip_norm: float | None
    adapter: str
    work: str
    emulators: tuple[str, ...]

    @property
    def quantiser(self) -> Quantiser:
        """How values become whole numbers."""
        return Quantiser(self.clip_range, self.num_bits, self.max_examples, self.cohort_size)

    def digest(self) -> str:
        """Return the SHA-256 of the terms."""
        text = json.dumps([PROTOCOL, asdict(self)], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def read_terms(value: object) -> Terms:
    """Return the terms that a message holds, each part there, of its type and in its range.

    Raises:
        WireError: If one is not.
    """
    if not isinstance(value, dict):
        raise WireError("terms of secure aggregation must be a mapping")
    try:
        terms = Terms(**{**value, "emulators": tuple(value["emulators"])})
    except (TypeError, KeyError) as error:
        raise WireError(f"not terms of secure aggregation: {error!r:.120}") from error
    texts: tuple[object, ...] = (
        terms.run,
        terms.session,
        terms.adapter,
        terms.work,
        *terms.emulators,
    )
    counts = (terms.server_round, terms.cohort_size, terms.num_neighbours, terms.max_examples)
    bits, bound = terms.num_bits, terms.clip_norm
    fits = (
        all(isinstance(text, str) and 0 < len(text) <= _MAX_TEXT for text in texts)
        and len(terms.emulators) <= _MAX_EMULATORS
        and all(_is_whole(count) and 0 < count <= _MAX_SIZE for count in counts)
        and _is_whole(bits)
        and 2 <= bits <= _MAX_BITS
        and _is_positive(terms.threshold_ratio)
        and terms.threshold_ratio <= 1
        and _is_positive(terms.clip_range)
        and (bound is None or _is_positive(bound))
    )
    if not fits:
        raise WireError("terms of secure aggregation are out of range")
    return terms


def _is_whole(value: object) -> bool:
    return type(value) is int


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < math.inf


def work_digest(task: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a train task has to say to all devices of a round alike.

    With other steps or another learning rate a device would change little, and the update of one
    that was told the right ones stand out.

    Args:
        task: The task as plain data: its record, or what is the same for all in it.
    """
    text = json.dumps({key: task[key] for key in _COMMON}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
