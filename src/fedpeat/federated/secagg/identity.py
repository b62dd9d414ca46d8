"""Who a device is to other devices: a long-term key, which the authority has certified.

Certificates are those that ``fedpeat keys`` makes, so that a fleet has them. Simulated devices get
an authority and keys of their own, which are gone with the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeat.core.errors import ConfigError, WireError
from fedpeat.federated.certificates import certificate_of, named

__all__ = ["Authority", "Identity", "identity_of", "simulated"]

_PEM = serialization.Encoding.PEM
_HASH = hashes.SHA384()
_DEVICE = ExtendedKeyUsageOID.CLIENT_AUTH  # the server has a certificate too, and is no device
_MAX_COMMON_NAME = 64
_SIMULATED_DAYS = 3650
_CERTIFICATE_BYTES = 1024
"""Certificates are padded to this, so that the bytes of a run do not depend on random keys."""


@dataclass(frozen=True)
class Authority:
    """Whose certificates count.

    Attributes:
        certificate: Its own certificate, PEM.
    """

    certificate: bytes

    def check(self, name: str, certificate: bytes, signature: bytes, message: bytes) -> None:
        """Check that a device of a name signed a message.

        Raises:
            WireError: If it did not, or nobody vouches for its key.
        """
        key = _certified_key(self.certificate, certificate, name)
        width = _width(key)
        if len(signature) != 2 * width:
            raise WireError(f"the signature of {name!r:.80} must have {2 * width} bytes")
        r, s = (int.from_bytes(half, "big") for half in (signature[:width], signature[width:]))
        try:
            key.verify(encode_dss_signature(r, s), message, ec.ECDSA(_HASH))
        except InvalidSignature as error:
            raise WireError(f"{name!r:.80} did not sign this") from error


@dataclass(frozen=True)
class Identity:
    """A device that others can know.

    Attributes:
        name: What its certificate calls it.
        key: Its private key.
        certificate: Its certificate, PEM.
        authority: Whose certificates it goes by.
    """

    name: str
    key: ec.EllipticCurvePrivateKey
    certificate: bytes
    authority: Authority

    def sign(self, message: bytes) -> bytes:
        """Return its signature, of one length for every message."""
        width = _width(self.key)
        r, s = decode_dss_signature(self.key.sign(message, ec.ECDSA(_HASH)))
        return r.to_bytes(width, "big") + s.to_bytes(width, "big")


def identity_of(name: str, ca: Path, key: Path, certificate: Path) -> Identity:
    """Return the identity in a device's files, which ``device_keys`` has checked.

    Raises:
        ConfigError: If they cannot be read.
    """
    try:
        private = serialization.load_ssh_private_key(key.read_bytes(), None)
        own, authority = certificate.read_bytes(), Authority(ca.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the keys of {name}: {error}") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{key} must be a key on an elliptic curve")
    return Identity(name, private, own.ljust(_CERTIFICATE_BYTES), authority)


def simulated(names: Iterable[str]) -> tuple[dict[str, Identity], bytes]:
    """Return identities for devices in this process, and the certificate of their authority."""
    root = ec.generate_private_key(ec.SECP256R1())
    issuer = named("fedpeat simulation")
    builder = certificate_of(
        issuer, issuer, root.public_key(), datetime.now(UTC), _SIMULATED_DAYS
    ).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    authority = Authority(builder.sign(root, hashes.SHA256()).public_bytes(_PEM))
    identities = {}
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        own = (
            certificate_of(
                named(_common_name(name)),
                issuer,
                key.public_key(),
                datetime.now(UTC),
                _SIMULATED_DAYS,
            )
            .add_extension(x509.ExtendedKeyUsage([_DEVICE]), critical=False)
            .sign(root, hashes.SHA256())
        )
        pem = own.public_bytes(_PEM).ljust(_CERTIFICATE_BYTES)
        identities[name] = Identity(name, key, pem, authority)
    return identities, authority.certificate


@lru_cache(maxsize=4096)  # a round of n devices asks n^2 times
def _certificate(authority: bytes, certificate: bytes) -> x509.Certificate:
    try:
        found = x509.load_pem_x509_certificate(certificate)
        found.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise WireError("a certificate is not of this fleet's authority") from error
    return found


def _certified_key(authority: bytes, certificate: bytes, name: str) -> ec.EllipticCurvePublicKey:
    found = _certificate(authority, certificate)
    names = [str(a.value) for a in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [_common_name(name)] or not _is_device(found):
        raise WireError(f"the certificate of {name!r:.80} is not that of a device of this name")
    if not found.not_valid_before_utc <= datetime.now(UTC) <= found.not_valid_after_utc:
        raise WireError(f"the certificate of {name!r:.80} is not valid now")
    key = found.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise WireError(f"the key of {name!r:.80} must be on an elliptic curve")
    return key


def _width(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) -> int:
    return (key.curve.key_size + 7) // 8


def _is_device(certificate: x509.Certificate) -> bool:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except x509.ExtensionNotFound:
        return False
    return _DEVICE in usage.value


def _common_name(name: str) -> str:
    """Return what a certificate calls a device; a simulated one may have a long name."""
    is_short = len(name.encode()) <= _MAX_COMMON_NAME
    return name if is_short else hashlib.sha256(name.encode()).hexdigest()
