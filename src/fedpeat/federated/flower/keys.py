"""Keys and certificates of a fleet: one authority, a server, and a key for each device.

FOLDER/
  authority/       ca.key: signs certificates; keep it off the server and off the network
  server/          ca.crt, server.crt, server.key and the devices' public keys: for the server
  devices/NAME/    ca.crt, device.key, device.pub, device.crt: for the device called NAME
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeat.core.errors import ConfigError
from fedpeat.core.run_folder import replace_folder, storage_errors
from fedpeat.federated.certificates import certificate_of, named

__all__ = ["DeviceKeys", "ServerKeys", "device_keys", "make_keys", "server_keys"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_CURVE = ec.SECP384R1  # one that SuperNodes can sign with
_LOOPBACK = "127.0.0.1"
_PEM = serialization.Encoding.PEM
_PKCS8, _OPENSSH = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.OpenSSH


@dataclass(frozen=True)
class ServerKeys:
    """Files that the server works with.

    Attributes:
        ca: Certificate of the authority.
        certificate: Certificate of the server.
        key: Private key of the server.
        devices: Public key of each device by its name.
    """

    ca: Path
    certificate: Path
    key: Path
    devices: dict[str, Path]


@dataclass(frozen=True)
class DeviceKeys:
    """Files that a device works with.

    Attributes:
        name: What the device is called.
        ca: Certificate of the authority.
        key: Private key of the device, in the form of OpenSSH.
        certificate: Certificate of the device.
    """

    name: str
    ca: Path
    key: Path
    certificate: Path


def make_keys(
    folder: Path, hosts: Sequence[str], devices: Sequence[str], num_days: int = 365
) -> list[str]:
    """Make what is not there yet: authority, server and devices.

    Args:
        folder: Where to; devices can be added to one that has an authority.
        hosts: Names and addresses under which devices reach the server.
        devices: Names of devices.
        num_days: How long certificates are valid.

    Returns:
        The names of the devices that are new.

    Raises:
        ConfigError: If a name or number cannot be, or the authority's key is not there any more.
        StorageError: If the folder cannot be written.
    """
    for name in devices:
        if not _NAME.fullmatch(name) or name == "server":
            raise ConfigError(
                "a device's name must be up to 63 letters, digits, dots, dashes or underscores, "
                f"begin with a letter or digit and not be 'server', got {name!r}"
            )
    if num_days < 1:
        raise ConfigError(f"certificates must be valid for at least 1 day, got {num_days}")
    with storage_errors(folder):
        authority = _authority(folder, num_days)
        if not (folder / "server" / "server.key").exists():
            _make_server(folder / "server", authority, hosts, num_days)
        new = [name for name in devices if not (folder / "devices" / name).exists()]
        for name in new:
            _make_device(folder, name, authority, num_days)
    return new


def server_keys(folder: Path) -> ServerKeys:
    """Return the files of a server, checked.

    Raises:
        ConfigError: If one is missing, damaged, of another authority or expired.
    """
    keys = ServerKeys(
        folder / "ca.crt",
        folder / "server.crt",
        folder / "server.key",
        {path.stem: path for path in sorted((folder / "devices").glob("*.pub"))},
    )
    _check(keys.ca, keys.certificate, keys.key)
    if not keys.devices:
        raise ConfigError(f"{folder / 'devices'} must have a device's public key (NAME.pub)")
    return keys


def device_keys(folder: Path) -> DeviceKeys:
    """Return the files of a device, checked.

    Raises:
        ConfigError: If one is missing, damaged, of another authority or expired.
    """
    ca, key, path = folder / "ca.crt", folder / "device.key", folder / "device.crt"
    certificate = _check(ca, path, key)
    name = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    return DeviceKeys(str(name), ca, key, path)


@dataclass(frozen=True)
class _Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def _authority(folder: Path, num_days: int) -> _Authority:
    """Return the authority that the folder has, or a new one."""
    key_path, ca_path = folder / "authority" / "ca.key", folder / "server" / "ca.crt"
    if key_path.exists():
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return _Authority(key, _read_certificate(ca_path))
    if ca_path.exists():
        raise ConfigError(f"{key_path} must be there to make further keys; bring it back for that")
    key = ec.generate_private_key(_CURVE())
    name = named("fedpeat authority")
    certificate = (
        certificate_of(name, name, key.public_key(), datetime.now(UTC), num_days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_key(key_path, key, _PKCS8)
    _write(ca_path, certificate.public_bytes(_PEM))
    return _Authority(key, certificate)


def _make_server(folder: Path, authority: _Authority, hosts: Sequence[str], num_days: int) -> None:
    if not hosts:
        raise ConfigError("a server's certificate must name at least one host, got none")
    key = ec.generate_private_key(_CURVE())
    own = dict.fromkeys([*hosts, _LOOPBACK])  # where the gate reaches the SuperLink
    names = x509.SubjectAlternativeName([_host(host) for host in own])
    certificate = _issued(
        "fedpeat server", key, authority, num_days, ExtendedKeyUsageOID.SERVER_AUTH, names
    )
    _write(folder / "server.crt", certificate.public_bytes(_PEM))
    _write_key(folder / "server.key", key, _PKCS8)


def _make_device(folder: Path, name: str, authority: _Authority, num_days: int) -> None:
    key = ec.generate_private_key(_CURVE())
    certificate = _issued(name, key, authority, num_days, ExtendedKeyUsageOID.CLIENT_AUTH)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    _write(folder / "server" / "devices" / f"{name}.pub", public)
    with replace_folder(folder / "devices" / name) as own:
        _write(own / "ca.crt", authority.certificate.public_bytes(_PEM))
        _write(own / "device.crt", certificate.public_bytes(_PEM))
        _write(own / "device.pub", public)
        _write_key(own / "device.key", key, _OPENSSH)


def _issued(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    authority: _Authority,
    num_days: int,
    purpose: x509.ObjectIdentifier,
    names: x509.SubjectAlternativeName | None = None,
) -> x509.Certificate:
    issuer = authority.certificate.subject
    builder = (
        certificate_of(named(name), issuer, key.public_key(), datetime.now(UTC), num_days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
    )
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    return builder.sign(authority.key, hashes.SHA384())


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_key(
    path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    content = key.private_bytes(_PEM, form, serialization.NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _check(ca_path: Path, path: Path, key_path: Path) -> x509.Certificate:
    """Return a certificate that fits its key, and that the authority signed and that is valid.

    Raises:
        ConfigError: If it is not.
    """
    ca, certificate = _read_certificate(ca_path), _read_certificate(path)
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise ConfigError(f"{path} must be signed by the authority of {ca_path}") from error
    now = datetime.now(UTC)
    for one, own in ((ca_path, ca), (path, certificate)):
        if not own.not_valid_before_utc <= now <= own.not_valid_after_utc:
            raise ConfigError(
                f"{one} must be valid now: it is from {own.not_valid_before_utc:%Y-%m-%d} "
                f"to {own.not_valid_after_utc:%Y-%m-%d}"
            )
    if _read_key(key_path).public_key() != certificate.public_key():
        raise ConfigError(f"{key_path} must be the key of {path}, got another one")
    return certificate


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read certificate {path}: {error}") from error


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        content = path.read_bytes()
        if b"OPENSSH" in content:
            key: object = serialization.load_ssh_private_key(content, None)
        else:
            key = serialization.load_pem_private_key(content, None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read key {path}: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} must be a key on an elliptic curve, got {type(key).__name__}")
    return key
