"""A device's side of secure aggregation: one session a round, each step once and in order.

Kinds of messages, beside a participant's, and what a device answers:
    secagg_keys       the terms of a round -> two public keys, signed with its long-term key
    secagg_shares     the keys of its neighbours -> sealed for each, shares of two secrets
    train             (with the shares that neighbours sealed for it) -> its update, masked
    secagg_survivors  whose updates came -> its signature under that list
    secagg_unmask     the signatures of others under the same list -> of each neighbour one share:
                      of its own mask if its update came, of the key of its other masks if not

It refuses whatever is not signed by a device that the authority knows, for this session and under
the same terms; and it never gives both shares of one device, since it does the last step once.

Source:
    Bonawitz et al. (2017), Practical secure aggregation for privacy-preserving machine learning,
    figure 4 with the consistency check of the active-adversary model; Bell et al. (2020) for
    neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedpeat.core.errors import WireError
from fedpeat.core.wire import Payload, digest
from fedpeat.federated.secagg import crypto
from fedpeat.federated.secagg.graph import threshold
from fedpeat.federated.secagg.identity import Authority, Identity
from fedpeat.federated.secagg.terms import PROTOCOL, Terms, read_terms
from fedpeat.federated.secagg.vector import vector_of

__all__ = ["RoundKeys", "SecureDevice", "binary", "read_keys", "survivors_text"]

_MAX_DEVICES = 2**16
_MAX_CERTIFICATE = 2**14
_KEY_BYTES = 32


@dataclass(frozen=True)
class RoundKeys:
    """Public keys of a device for one round.

    Attributes:
        mask_key: From which masks with neighbours come.
        seal_key: With which shares are sealed.
        signature: The device's under both, and the terms.
        certificate: The authority's word for the device's long-term key.
    """

    mask_key: bytes
    seal_key: bytes
    signature: bytes
    certificate: bytes

    def check(self, name: str, terms: Terms, authority: Authority) -> None:
        """Check that the device of a name made them for these terms.

        Raises:
            WireError: If it did not.
        """
        text = _keys_text(terms, name, self.mask_key, self.seal_key)
        authority.check(name, self.certificate, self.signature, text)

    def record(self) -> dict[str, str]:
        """Return them as plain data."""
        return {
            "mask_key": self.mask_key.hex(),
            "seal_key": self.seal_key.hex(),
            "signature": self.signature.hex(),
            "certificate": self.certificate.decode(),
        }


def read_keys(value: object) -> RoundKeys:
    """Return the keys that a message holds.

    Raises:
        WireError: If they are not there, or not of their form.
    """
    if not isinstance(value, dict):
        raise WireError("keys of a round must be a mapping")
    certificate = value.get("certificate")
    if not isinstance(certificate, str) or len(certificate) > _MAX_CERTIFICATE:
        raise WireError("keys of a round must come with a certificate")
    mask_key, seal_key = (binary(value.get(key), _KEY_BYTES) for key in ("mask_key", "seal_key"))
    return RoundKeys(mask_key, seal_key, binary(value.get("signature")), certificate.encode())


def binary(value: object, length: int | None = None) -> bytes:
    """Return the bytes that a text of hexadecimal digits stands for.

    Raises:
        WireError: If it is no such text, or not of the length [byte].
    """
    if not isinstance(value, str):
        raise WireError(f"keys and shares must be hexadecimal text, got {type(value).__name__}")
    try:
        found = bytes.fromhex(value)
    except ValueError as error:
        raise WireError(f"keys and shares must be hexadecimal text: {error}") from error
    if length is not None and len(found) != length:
        raise WireError(f"a key or share must have {length} bytes, got {len(found)}")
    return found


def survivors_text(terms: Terms, survivors: Iterable[str]) -> bytes:
    """Return what is signed of a list of devices whose updates came."""
    return _text("survivors", terms, *sorted(survivors))


def _keys_text(terms: Terms, name: str, mask_key: bytes, seal_key: bytes) -> bytes:
    return _text("keys", terms, name, mask_key.hex(), seal_key.hex())


def _text(what: str, terms: Terms, *words: str) -> bytes:
    return json.dumps([PROTOCOL, what, terms.digest(), *words]).encode()


@dataclass
class _Session:
    """What a device knows of the round that it is in; all of it is gone after the last step."""

    terms: Terms
    mask_seed: bytes
    mask_private: X25519PrivateKey
    seal_private: X25519PrivateKey
    own_seed: bytes
    step: str = "keys"
    neighbours: dict[str, RoundKeys] = field(default_factory=dict)
    needed: int = 0
    own_shares: tuple[bytes, bytes] = (b"", b"")
    shares: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    survivors: frozenset[str] = frozenset()


class SecureDevice:
    """A device's side of secure aggregation.

    Args:
        identity: Who it is to others.
        min_devices: Fewest devices, itself included, in whose sum it hides.
    """

    def __init__(self, identity: Identity, min_devices: int) -> None:
        self._identity = identity
        self._min_devices = min_devices
        self._session: _Session | None = None

    @property
    def name(self) -> str:
        """Its name."""
        return self._identity.name

    @property
    def kinds(self) -> Mapping[str, Callable[[Payload], Payload]]:
        """Who answers each kind of message."""
        return {
            "secagg_keys": self._keys,
            "secagg_shares": self._shares,
            "secagg_survivors": self._survivors,
            "secagg_unmask": self._unmask,
        }

    def _keys(self, payload: Payload) -> Payload:
        """Begin a session; one that was not finished is forgotten."""
        terms = read_terms(payload.record.get("terms"))
        if not 0.5 < terms.threshold_ratio <= 1:
            raise WireError(
                "more than half of a neighbourhood must be needed to open a secret, got "
                f"{terms.threshold_ratio}"
            )
        mask_seed, seal_seed = crypto.new_seed(), crypto.new_seed()
        mask_private, mask_key = crypto.key_pair(mask_seed)
        seal_private, seal_key = crypto.key_pair(seal_seed)
        self._session = _Session(terms, mask_seed, mask_private, seal_private, crypto.new_seed())
        signature = self._identity.sign(_keys_text(terms, self.name, mask_key, seal_key))
        keys = RoundKeys(mask_key, seal_key, signature, self._identity.certificate)
        return Payload(record={"session": terms.session, "keys": keys.record()})

    def _shares(self, payload: Payload) -> Payload:
        """Check the neighbours, and share two secrets with them."""
        session = self._at("keys", payload.record)
        session.neighbours = self._checked_neighbours(payload.record.get("neighbours"), session)
        members = sorted([self.name, *session.neighbours])
        session.needed = threshold(session.terms.threshold_ratio, len(members))
        if 2 * session.needed <= len(members):
            raise WireError(f"{session.needed} of {len(members)} devices are no majority")
        shares = dict(
            zip(
                members,
                zip(
                    crypto.split(session.own_seed, session.needed, len(members)),
                    crypto.split(session.mask_seed, session.needed, len(members)),
                    strict=True,
                ),
                strict=True,
            )
        )
        session.own_shares = shares.pop(self.name)
        name, session_id = self.name, session.terms.session
        sealed = {
            other: crypto.sealed(
                crypto.agreed(session.seal_private, session.neighbours[other].seal_key),
                *(session_id, name, other, b"".join(pair)),
            ).hex()
            for other, pair in shares.items()
        }
        session.step = "shares"
        return Payload(record={"session": session_id, "shares": sealed})

    def _checked_neighbours(self, value: object, session: _Session) -> dict[str, RoundKeys]:
        if not isinstance(value, dict) or self.name in value or len(value) > _MAX_DEVICES:
            raise WireError("neighbours must be a mapping of other devices to their keys")
        if len(value) + 1 < self._min_devices:
            raise WireError(
                f"{len(value) + 1} devices are too few to hide among, {self._min_devices} wanted"
            )
        neighbours = {name: read_keys(keys) for name, keys in value.items()}
        for name, keys in neighbours.items():
            keys.check(name, session.terms, self._identity.authority)
        public = [key for keys in neighbours.values() for key in (keys.mask_key, keys.seal_key)]
        if len(set(public)) != len(public):
            raise WireError("two devices of a round must not have the same key")
        return neighbours

    def begin(
        self,
        part: object,
        adapter: Mapping[str, np.ndarray],
        server_round: int,
        emulator: str,
        work: str,
    ) -> None:
        """Check a train task against the terms, and open the shares that come with it.

        Raises:
            WireError: If something does not fit; nothing is trained then.
        """
        if not isinstance(part, dict):
            raise WireError("this device takes part with secure aggregation only")
        session = self._at("shares", part)
        terms = session.terms
        found = (server_round, digest(adapter), work)
        if found != (terms.server_round, terms.adapter, terms.work):
            raise WireError("round, adapter or settings are not those of the round's terms")
        if emulator not in terms.emulators:
            raise WireError("the emulator is not one of the round's terms")
        sealed = part.get("shares")
        if not isinstance(sealed, dict) or not sealed.keys() <= session.neighbours.keys():
            raise WireError("shares must be a mapping of neighbours to what they sealed")
        if len(sealed) + 1 < max(session.needed, self._min_devices):
            raise WireError(
                f"shares of {len(sealed)} other devices are too few, "
                f"{max(session.needed, self._min_devices) - 1} wanted"
            )
        session.step = "begun"
        session.shares = {name: self._opened(session, name, sealed[name]) for name in sealed}

    def _opened(self, session: _Session, sender: str, text: object) -> tuple[bytes, bytes]:
        secret = crypto.agreed(session.seal_private, session.neighbours[sender].seal_key)
        plain = crypto.opened(secret, session.terms.session, sender, self.name, binary(text))
        if len(plain) != 2 * crypto.SEED_BYTES:
            raise WireError(f"the shares of {sender!r} must have {2 * crypto.SEED_BYTES} bytes")
        return plain[: crypto.SEED_BYTES], plain[crypto.SEED_BYTES :]

    def masked(
        self,
        start: Mapping[str, np.ndarray],
        update: Mapping[str, np.ndarray],
        num_examples: int,
        num_tokens: int,
        mean_loss: float,
    ) -> Payload:
        """Return what was tuned as a vector that says nothing without those of all others.

        Raises:
            WireError: If the update has values that are not finite, or there are too many examples.
        """
        session = self._session
        if session is None or session.step != "begun":
            raise WireError("no round of secure aggregation was begun")
        quantiser = session.terms.quantiser
        vector = vector_of(
            quantiser,
            start,
            update,
            num_examples=num_examples,
            num_tokens=num_tokens,
            mean_loss=mean_loss,
            clip_norm=session.terms.clip_norm,
        )
        size, ring, session_id = len(vector), quantiser.ring, session.terms.session
        vector += crypto.mask(
            crypto.self_mask_key(session.own_seed, session_id, self.name), size, ring
        )
        for other in session.shares:
            secret = crypto.agreed(session.mask_private, session.neighbours[other].mask_key)
            key = crypto.pair_mask_key(secret, session_id, self.name, other)
            combine = np.add if self.name < other else np.subtract
            combine(vector, crypto.mask(key, size, ring), out=vector)
        session.step = "masked"
        return Payload({"masked": ring.packed(vector)}, {"session": session_id})

    def _survivors(self, payload: Payload) -> Payload:
        """Sign the list of those whose updates came, the only one that is signed in a session."""
        session = self._at("masked", payload.record)
        listed = payload.record.get("survivors")
        if (
            not isinstance(listed, list)
            or not all(isinstance(name, str) for name in listed)
            or len(set(listed)) != len(listed)
            or self.name not in listed
        ):
            raise WireError("survivors must be a list of names with this device's among them")
        survivors = frozenset(listed)
        near = survivors & session.neighbours.keys()
        if not near <= session.shares.keys():
            raise WireError("a device cannot have survived that shared no secret")
        if len(near) + 1 < session.needed:
            raise WireError(f"{len(near) + 1} survivors are too few, {session.needed} wanted")
        session.survivors, session.step = survivors, "signed"
        signature = self._identity.sign(survivors_text(session.terms, survivors))
        return Payload(record={"session": session.terms.session, "signature": signature.hex()})

    def _unmask(self, payload: Payload) -> Payload:
        """Give one share of each neighbour, once enough others signed the same survivors."""
        session = self._at("signed", payload.record)
        signatures = payload.record.get("signatures")
        if not isinstance(signatures, dict):
            raise WireError("signatures must be a mapping of devices to signatures")
        near = session.survivors & session.neighbours.keys()
        if not signatures.keys() <= near:
            raise WireError("signatures must be those of neighbours whose updates came")
        if len(signatures) + 1 < session.needed:
            raise WireError(
                f"{len(signatures) + 1} signatures are too few, {session.needed} wanted"
            )
        text = survivors_text(session.terms, session.survivors)
        for name, signature in signatures.items():
            certificate = session.neighbours[name].certificate
            self._identity.authority.check(name, certificate, binary(signature), text)
        self._session = None
        kept = {self.name: session.own_shares, **session.shares}
        survived = {name: own.hex() for name, (own, _) in kept.items() if name in session.survivors}
        gone = {name: key.hex() for name, (_, key) in kept.items() if name not in session.survivors}
        record = {"session": session.terms.session, "own_shares": survived, "key_shares": gone}
        return Payload(record=record)

    def _at(self, step: str, record: Mapping[str, Any]) -> _Session:
        """Return the session, which must be the message's and have come to a step."""
        session = self._session
        if session is None or record.get("session") != session.terms.session:
            raise WireError("this is not a message of the session that this device is in")
        if session.step != step:
            raise WireError(f"this step comes after {step!r}, the session is at {session.step!r}")
        return session
