"""What all certificates of a fleet have in common, real or simulated."""

from __future__ import annotations

from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["certificate_of", "named"]


def named(name: str) -> x509.Name:
    """Return the subject of a certificate."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def certificate_of(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    num_days: int,
) -> x509.CertificateBuilder:
    """Return a certificate for a key, to be completed and signed.

    Args:
        subject: Whose key it is.
        issuer: Who signs it.
        key: The key.
        now: When it is made; it is valid from then on.
        num_days: How long it is valid [d].
    """
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + timedelta(days=num_days))
    )
