"""The server's side of secure aggregation: it passes keys and shares on, and opens the sum.

A round has four messages beside "train" (see ``device``). A device may be lost after any of them;
as long as enough of each neighbourhood are left, the sum of those whose vectors came is opened.
Otherwise nothing is: the round fails, and says of what there was too little.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

from fedpeat.adapter.lora import State
from fedpeat.core.errors import WireError
from fedpeat.core.records import ParticipantResult, Reply
from fedpeat.core.seeds import generator
from fedpeat.core.wire import Payload, decode, digest, encode
from fedpeat.federated.admission import Outcome, answered, refused, with_seconds
from fedpeat.federated.exchange import Exchange
from fedpeat.federated.screening import MAX_ANSWER_BYTES, check_entries, shown
from fedpeat.federated.secagg import crypto
from fedpeat.federated.secagg.device import RoundKeys, binary, read_keys, survivors_text
from fedpeat.federated.secagg.graph import enough_neighbours, neighbourhoods, threshold
from fedpeat.federated.secagg.identity import Authority
from fedpeat.federated.secagg.terms import Terms
from fedpeat.federated.secagg.vector import NUM_EXTRAS, Sums, read_sums

__all__ = ["SecureAggregation", "SecureRound"]

_SEALED_BYTES = 12 + 2 * crypto.SEED_BYTES + 16  # nonce, two shares, tag
_RUN_BYTES = 16
_NAMED_BYTES = 1024  # what a device says of a neighbour: its name, sealed bytes in hexadecimal

T = TypeVar("T")


@dataclass(frozen=True)
class SecureAggregation:
    """How the rounds of a run are aggregated.

    Attributes:
        authority: Whose devices may take part.
        threshold_ratio: Share of a neighbourhood that opens a secret.
        num_neighbours: Neighbours of each device; None for as many as is safe.
        min_devices: Fewest devices in a sum.
        clip_range: Values of a change beyond it are clipped on the device.
        num_bits: Bits of a value.
        max_examples: Most examples that a device may weigh.
        clip_norm: Largest norm of a device's change, to which it scales it itself; None for none.
        seed: Draws who is whose neighbour.
        run: Names the run.
    """

    authority: Authority
    threshold_ratio: float
    num_neighbours: int | None
    min_devices: int
    clip_range: float
    num_bits: int
    max_examples: int
    clip_norm: float | None = None
    seed: int = 0
    run: str = field(default_factory=lambda: secrets.token_hex(_RUN_BYTES))

    def begin(
        self,
        names: Sequence[str],
        *,
        server_round: int,
        adapter: State,
        work: str,
        emulators: Iterable[str],
        exchange: Exchange,
    ) -> SecureRound:
        """Have devices agree on terms, exchange keys and share secrets.

        Args:
            names: Devices.
            server_round: The round.
            adapter: What all of them start from.
            work: Hash of how they train.
            emulators: Hashes of what they may train on.
            exchange: How they are reached.

        Raises:
            AggregationError: If the transport fails, or the settings leave no room for a sum.
        """
        asked = self.num_neighbours or enough_neighbours(len(names), self.threshold_ratio)
        terms = Terms(
            run=self.run,
            session=secrets.token_hex(_RUN_BYTES),
            server_round=server_round,
            cohort_size=len(names),
            threshold_ratio=self.threshold_ratio,
            num_neighbours=max(1, asked),
            clip_range=self.clip_range,
            num_bits=self.num_bits,
            max_examples=self.max_examples,
            clip_norm=self.clip_norm,
            adapter=digest(adapter),
            work=work,
            emulators=tuple(sorted(set(emulators))),
        )
        terms.quantiser.ring  # noqa: B018 - raises before anybody trains for nothing
        secure = SecureRound(self, terms, exchange)
        secure.exchange_keys(names)
        secure.exchange_shares()
        return secure


class SecureRound:
    """One round, as far as it has come.

    Attributes:
        shortage: Why there will be no sum; empty as long as there may be one.
        refused: What came of devices that are out of the round.
    """

    def __init__(self, settings: SecureAggregation, terms: Terms, exchange: Exchange) -> None:
        self._settings = settings
        self._terms = terms
        self._exchange = exchange
        self._keys: dict[str, RoundKeys] = {}
        self._near: Mapping[str, tuple[str, ...]] = {}
        self._sealed: dict[str, dict[str, str]] = {}
        self.shortage = ""
        self.refused: dict[str, Outcome] = {}

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """What the train message of each device still in the round says beside the task."""
        if self.shortage:
            return {}
        return {
            name: {
                "session": self._terms.session,
                "shares": {
                    sender: self._sealed[sender][name]
                    for sender in self._others(name)
                    if sender in self._sealed
                },
            }
            for name in self._sealed
        }

    def exchange_keys(self, names: Sequence[str]) -> None:
        """Take the round's public keys of devices, each signed by its own."""
        message = encode(Payload(record={"terms": asdict(self._terms)}))
        seen: set[bytes] = set()

        def checked(name: str, payload: Payload) -> RoundKeys:
            keys = read_keys(payload.record.get("keys"))
            keys.check(name, self._terms, self._settings.authority)
            if seen & {keys.mask_key, keys.seal_key}:
                raise WireError("another device has the same key")
            seen.update((keys.mask_key, keys.seal_key))
            return keys

        self._keys = self._ask("secagg_keys", dict.fromkeys(names, message), checked)
        self._enough(len(self._keys), "sent keys")
        rng = generator(self._settings.seed, "secagg", self._terms.server_round)
        if self._keys:
            self._near = neighbourhoods(list(self._keys), self._terms.num_neighbours, rng)

    def exchange_shares(self) -> None:
        """Hand each device the keys of its neighbours, and take what it seals for them."""
        if self.shortage:
            return
        session = self._terms.session
        tasks = {}
        for name in self._keys:
            keys = {other: self._keys[other].record() for other in self._others(name)}
            tasks[name] = encode(Payload(record={"session": session, "neighbours": keys}))

        def checked(name: str, payload: Payload) -> dict[str, str]:
            sealed = payload.record.get("shares")
            if not isinstance(sealed, dict) or sealed.keys() != set(self._others(name)):
                raise WireError("shares must be for all neighbours, and nobody else")
            for text in sealed.values():
                binary(text, _SEALED_BYTES)
            return sealed

        self._sealed = self._ask("secagg_shares", tasks, checked)
        self._enough(len(self._sealed), "shared secrets")

    def finish(
        self,
        answers: Mapping[str, Reply | None],
        start: State,
        expected: Mapping[str, Mapping[str, Any]],
    ) -> tuple[Sums | None, dict[str, Outcome]]:
        """Open the sum of the vectors that came.

        Args:
            answers: Replies to "train".
            start: What all devices were given of what they tuned.
            expected: Record entries that must come back from each.

        Returns:
            The sum, or None if there is a shortage; and what came of each device.
        """
        if self.shortage:
            return None, dict(self.refused)
        num_values = sum(array.size for array in start.values()) + NUM_EXTRAS
        ring = self._terms.quantiser.ring
        total = np.zeros(num_values, np.uint64)

        def added(name: str, payload: Payload) -> Outcome:
            """Add a vector to the sum, and keep nothing of it."""
            check_entries(payload.record, expected[name])
            seconds = float(with_seconds(payload).record["seconds"])
            packed = _packed_vector(payload, num_values * ring.num_bytes)
            np.add(total, ring.unpacked(packed), out=total)
            return Outcome(ParticipantResult(name, "device", "accepted", seconds=seconds))

        arrived = self._read(self._sealed, answers, added, num_values * ring.num_bytes)
        outcomes = {**self.refused, **arrived}
        near = [(sum(o in arrived for o in self._near[name]), name) for name in arrived]
        enough = self._enough(len(arrived), "sent updates") and all(
            self._enough(count, "sent updates", name) for count, name in near
        )
        masks = self._opened_masks(frozenset(arrived), num_values) if enough else None
        if masks is None:
            return None, outcomes
        try:
            sums = read_sums(self._terms.quantiser, total - masks, start, len(arrived))
        except WireError as error:
            self.shortage = str(error)
            return None, outcomes
        return sums, outcomes

    def _opened_masks(self, arrived: frozenset[str], size: int) -> np.ndarray | None:
        """Return the sum of all masks that are in the vectors; None if a secret stays shut."""
        shares = self._collect_shares(arrived)
        ring, session = self._terms.quantiser.ring, self._terms.session
        masks = np.zeros(size, np.uint64)
        for name in sorted(arrived):
            seed = self._combined(name, "own_shares", shares)
            if seed is None:
                return None
            masks += crypto.mask(crypto.self_mask_key(seed, session, name), size, ring)
        for gone in sorted(self._sealed.keys() - arrived):
            left = [other for other in self._others(gone) if other in arrived]
            seed = self._combined(gone, "key_shares", shares) if left else None
            if seed is None and left:
                return None
            if seed is None:
                continue
            private, public = crypto.key_pair(seed)
            if public != self._keys[gone].mask_key:
                self.shortage = f"the shares of the key of {shown(gone)} do not give it"
                return None
            for other in left:
                secret = crypto.agreed(private, self._keys[other].mask_key)
                key = crypto.pair_mask_key(secret, session, gone, other)
                combine = np.add if other < gone else np.subtract
                combine(masks, crypto.mask(key, size, ring), out=masks)
        return masks

    def _collect_shares(self, arrived: frozenset[str]) -> dict[str, dict[str, dict[str, bytes]]]:
        """Have the survivors sign their list, and then give the shares that open the sum."""
        session, listed = self._terms.session, sorted(arrived)
        text = survivors_text(self._terms, listed)

        def signed(name: str, payload: Payload) -> str:
            signature = binary(payload.record.get("signature"))
            self._settings.authority.check(name, self._keys[name].certificate, signature, text)
            return signature.hex()

        question = encode(Payload(record={"session": session, "survivors": listed}))
        signatures = self._ask("secagg_survivors", dict.fromkeys(listed, question), signed)
        tasks = {}
        for name in signatures:
            others = [other for other in self._others(name) if other in signatures]
            wanted = others[: self._needed(name) - 1]
            record = {"session": session, "signatures": {o: signatures[o] for o in wanted}}
            tasks[name] = encode(Payload(record=record))

        def checked(name: str, payload: Payload) -> dict[str, dict[str, bytes]]:
            known = {other for other in self._near[name] if other in self._sealed}
            wanted = {"own_shares": known & arrived, "key_shares": known - arrived}
            return {key: _read_shares(payload.record.get(key), wanted[key]) for key in wanted}

        return self._ask("secagg_unmask", tasks, checked)

    def _combined(
        self, owner: str, kind: str, shares: Mapping[str, Mapping[str, Mapping[str, bytes]]]
    ) -> bytes | None:
        """Return the secret of a device; None, with a shortage, if there are too few shares."""
        held = {
            place: shares[holder][kind][owner]
            for place, holder in enumerate(self._near[owner])
            if holder in shares
        }
        needed = self._needed(owner)
        if len(held) < needed:
            self.shortage = (
                f"too few devices gave their shares: {len(held)} of {shown(owner)}'s, "
                f"{needed} wanted"
            )
            return None
        return crypto.combine(held, needed)

    def _needed(self, name: str) -> int:
        return threshold(self._terms.threshold_ratio, len(self._near[name]))

    def _others(self, name: str) -> list[str]:
        return [other for other in self._near[name] if other != name]

    def _enough(self, count: int, what: str, name: str = "") -> bool:
        """Say whether enough devices, or neighbours of one, came this far; note a shortage."""
        wanted = self._settings.min_devices
        if self._near:
            wanted = max(wanted, self._needed(name or next(iter(self._near))))
        if count < wanted and not self.shortage:
            self.shortage = f"too few devices {what}: {count}, {wanted} wanted"
        return count >= wanted

    def _ask(
        self,
        kind: str,
        tasks: Mapping[str, bytes],
        read: Callable[[str, Payload], T],
    ) -> dict[str, T]:
        """Return what devices answer to a question."""
        return self._read(tasks, self._exchange.collect(kind, tasks), read)

    def _read(
        self,
        names: Iterable[str],
        replies: Mapping[str, Reply | None],
        read: Callable[[str, Payload], T],
        num_tensor_bytes: int = 0,
    ) -> dict[str, T]:
        """Return what is read in replies, in the order of names; note who fails, and why."""
        longest = MAX_ANSWER_BYTES + num_tensor_bytes + _NAMED_BYTES * len(self._keys)
        found: dict[str, T] = {}
        for name in sorted(names):
            content = answered(name, replies.get(name))
            if isinstance(content, Outcome):
                self.refused[name] = content
                continue
            try:
                payload = decode(content, longest)
                check_entries(payload.record, {"session": self._terms.session})
                found[name] = read(name, payload)
            except WireError as error:
                self.refused[name] = refused(name, "rejected", str(error))
        return found


def _packed_vector(payload: Payload, num_bytes: int) -> np.ndarray:
    packed = payload.arrays.get("masked")
    if len(payload.arrays) != 1 or packed is None:
        raise WireError("an update must be one masked vector, and no tensor besides")
    if packed.dtype != np.uint8 or packed.shape != (num_bytes,):
        raise WireError(
            f"a masked vector must be uint8 ({num_bytes},), got {packed.dtype} {packed.shape}"
        )
    return packed


def _read_shares(value: object, owners: set[str]) -> dict[str, bytes]:
    if not isinstance(value, dict) or value.keys() != owners:
        raise WireError("shares must be one of each neighbour, and of nobody else")
    return {owner: binary(share, crypto.SEED_BYTES) for owner, share in value.items()}
