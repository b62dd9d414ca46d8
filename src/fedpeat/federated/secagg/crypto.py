"""The primitives of secure aggregation, each from a well-kept library; nothing is made here.

X25519, HKDF, ChaCha20, ChaCha20-Poly1305 come from cryptography, Shamir's scheme from pycryptodome,
both of which the extra "flower" brings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from jaxtyping import UInt64

from fedpeat.core.errors import WireError
from fedpeat.federated.secagg.ring import Ring

__all__ = [
    "SEED_BYTES",
    "agreed",
    "combine",
    "key_pair",
    "mask",
    "new_seed",
    "opened",
    "pair_mask_key",
    "sealed",
    "self_mask_key",
    "split",
]

SEED_BYTES = 16
"""What Shamir's scheme shares at a time: 128 bits, which is what X25519 is good for too."""

_NONCE_BYTES = 12


def new_seed() -> bytes:
    """Return a secret from the system's generator."""
    return os.urandom(SEED_BYTES)


def key_pair(seed: bytes) -> tuple[X25519PrivateKey, bytes]:
    """Return the X25519 key of a seed, and its public half; whoever has the seed has the key."""
    private = X25519PrivateKey.from_private_bytes(_derived(seed, "", "x25519"))
    return private, private.public_key().public_bytes_raw()


def agreed(private: X25519PrivateKey, public: bytes) -> bytes:
    """Return the secret that two keys have in common.

    Raises:
        WireError: If the public one is no point from which a secret comes.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise WireError(f"not a public key of X25519: {error}") from error


def pair_mask_key(secret: bytes, session: str, one: str, other: str) -> bytes:
    """Return the key of the mask that two devices have in common, whichever of them asks."""
    return _derived(secret, session, "mask", *sorted((one, other)))


def self_mask_key(seed: bytes, session: str, name: str) -> bytes:
    """Return the key of a device's own mask."""
    return _derived(seed, session, "self", name)


def mask(key: bytes, size: int, ring: Ring) -> UInt64[np.ndarray, " values"]:
    """Return as many uniform numbers of the ring as asked for: the key's ChaCha20 stream.

    A key makes one mask, so that the counter and nonce can begin at 0.
    """
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    packed = np.frombuffer(stream.update(bytes(size * ring.num_bytes)), np.uint8)
    return ring.unpacked(packed)


def split(seed: bytes, needed: int, size: int) -> list[bytes]:
    """Return as many shares of a seed as asked for, so many of which are needed to have it."""
    return [bytes(share) for _, share in Shamir.split(needed, size, seed, False)]


def combine(shares: Mapping[int, bytes], needed: int) -> bytes:
    """Return the seed of some shares by their places, which begin at 0; the first ones do."""
    chosen = sorted(shares.items())[:needed]
    return bytes(Shamir.combine([(place + 1, share) for place, share in chosen], False))


def sealed(secret: bytes, session: str, sender: str, receiver: str, plain: bytes) -> bytes:
    """Return a text that only who has the secret can read, and knows from whom, to whom it is."""
    nonce = os.urandom(_NONCE_BYTES)
    key = _derived(secret, session, "share", sender, receiver)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, plain, session.encode())


def opened(secret: bytes, session: str, sender: str, receiver: str, text: bytes) -> bytes:
    """Return what was sealed.

    Raises:
        WireError: If it was changed, or sealed by another, for another or in another session.
    """
    key = _derived(secret, session, "share", sender, receiver)
    try:
        nonce, rest = text[:_NONCE_BYTES], text[_NONCE_BYTES:]
        return ChaCha20Poly1305(key).decrypt(nonce, rest, session.encode())
    except (InvalidTag, ValueError) as error:
        raise WireError(f"the shares of {sender!r} are not what it sealed") from error


def _derived(secret: bytes, session: str, *purpose: str) -> bytes:
    info = b"".join(len(word).to_bytes(2, "big") + word for word in map(str.encode, purpose))
    return HKDF(hashes.SHA256(), 32, session.encode(), b"fedpeat-secagg-1" + info).derive(secret)
