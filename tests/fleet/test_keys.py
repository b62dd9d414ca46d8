"""Keys and certificates: who may read them, whom they name, and which of them are refused."""

from __future__ import annotations

import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedpeat.core.errors import ConfigError
from fedpeat.federated.flower import keys
from fedpeat.federated.flower.keys import device_keys, make_keys, server_keys
from fleet.doors import keys_in


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The keys of a server and two devices, not to be changed."""
    folder = tmp_path_factory.mktemp("keys") / "keys"
    keys_in(folder)
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "keys"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_keys_and_their_folders_are_for_their_owner_alone(made: Path) -> None:
    private = sorted(str(path.relative_to(made)) for path in made.rglob("*.key"))
    assert private == [
        "authority/ca.key",
        "devices/client-00/device.key",
        "devices/client-01/device.key",
        "server/server.key",
    ]
    for name in private:
        assert mode(made / name) == 0o600
        assert mode((made / name).parent) == 0o700


def test_the_key_of_the_authority_is_in_no_folder_that_is_taken_away(made: Path) -> None:
    numbers = {path: key_number(path) for path in made.rglob("*.key")}
    assert len(set(numbers.values())) == len(numbers)


def key_number(path: Path) -> int:
    content = path.read_bytes()
    load = serialization.load_ssh_private_key if b"OPENSSH" in content else None
    key = load(content, None) if load else serialization.load_pem_private_key(content, None)
    return int(key.private_numbers().private_value)  # type: ignore[union-attr]


def test_the_server_has_the_public_keys_of_its_devices_by_name(made: Path) -> None:
    found = server_keys(made / "server")
    assert list(found.devices) == ["client-00", "client-01"]
    for name, path in found.devices.items():
        assert path.read_bytes() == (made / "devices" / name / "device.pub").read_bytes()


def test_a_device_is_called_as_its_certificate_says(made: Path) -> None:
    assert device_keys(made / "devices" / "client-01").name == "client-01"


def test_the_servers_certificate_names_hosts_and_the_loopback_that_the_gate_reaches_it_by(
    tmp_path: Path,
) -> None:
    make_keys(tmp_path, ["fleet.example.org", "10.0.0.7", "::1"], [])
    content = (tmp_path / "server" / "server.crt").read_bytes()
    certificate = x509.load_pem_x509_certificate(content)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fleet.example.org"]
    addresses = names.get_values_for_type(x509.IPAddress)
    assert [str(address) for address in addresses] == ["10.0.0.7", "::1", "127.0.0.1"]


def test_devices_are_added_later_and_what_is_there_stays(own: Path) -> None:
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    assert make_keys(own, ["elsewhere"], ["client-01", "client-02"]) == ["client-02"]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert device_keys(own / "devices" / "client-02").name == "client-02"
    assert "client-02" in server_keys(own / "server").devices


def test_no_device_is_added_without_the_key_of_the_authority(own: Path) -> None:
    (own / "authority" / "ca.key").unlink()
    with pytest.raises(ConfigError, match="ca.key must be there to make further keys"):
        make_keys(own, ["localhost"], ["client-02"])
    assert not (own / "devices" / "client-02").exists()


@pytest.mark.parametrize(
    "name", ["", "server", ".hidden", "../up", "a/b", "a b", "x" * 64, "-x", "a\n"]
)
def test_a_device_cannot_be_called_anything(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="a device's name must be up to 63 letters"):
        make_keys(tmp_path / "keys", ["localhost"], ["good", name])
    assert not (tmp_path / "keys").exists()


def test_a_certificate_is_valid_for_at_least_a_day(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="valid for at least 1 day, got 0"):
        make_keys(tmp_path, ["localhost"], [], num_days=0)


class LastYear(datetime):
    """A clock that is four hundred days slow."""

    @classmethod
    def now(cls, tz: object = None) -> LastYear:
        del tz
        then = datetime.now(UTC) - timedelta(days=400)
        return cls(*then.timetuple()[:6], tzinfo=UTC)


def test_an_expired_certificate_is_refused_with_its_dates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(keys, "datetime", LastYear)
        keys_in(tmp_path)
    ended = f"{datetime.now(UTC) - timedelta(days=35):%Y-%m-%d}"
    with pytest.raises(ConfigError, match=rf"ca.crt must be valid now: .* to {ended}"):
        server_keys(tmp_path / "server")
    with pytest.raises(ConfigError, match=rf"ca.crt must be valid now: .* to {ended}"):
        device_keys(tmp_path / "devices" / "client-00")


def test_a_certificate_of_another_authority_is_refused(own: Path, tmp_path: Path) -> None:
    keys_in(tmp_path / "other")
    foreign = tmp_path / "other" / "devices" / "client-00"
    for name in ("device.crt", "device.key"):
        shutil.copy(foreign / name, own / "devices" / "client-00" / name)
    with pytest.raises(ConfigError, match="device.crt must be signed by the authority of"):
        device_keys(own / "devices" / "client-00")


def test_the_key_of_another_device_is_refused(own: Path) -> None:
    one, other = (own / "devices" / name for name in ("client-00", "client-01"))
    shutil.copy(other / "device.key", one / "device.key")
    with pytest.raises(ConfigError, match="device.key must be the key of .*device.crt, got anoth"):
        device_keys(one)


def test_a_server_without_devices_is_refused(own: Path) -> None:
    shutil.rmtree(own / "server" / "devices")
    with pytest.raises(ConfigError, match="must have a device's public key"):
        server_keys(own / "server")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("device.crt", None, "cannot read certificate .*device.crt: .*No such file"),
        ("device.crt", b"nonsense", "cannot read certificate .*device.crt"),
        ("device.key", None, "cannot read key .*device.key: .*No such file"),
        ("device.key", b"nonsense", "cannot read key .*device.key"),
        ("ca.crt", b"", "cannot read certificate .*ca.crt"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(
    own: Path, name: str, content: bytes | None, message: str
) -> None:
    path = own / "devices" / "client-00" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        device_keys(path.parent)
