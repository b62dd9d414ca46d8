"""The files in deploy/ say what fedpeat understands, and what its own page says of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from cryptography import x509

from fedpeat.cli.main import main
from fedpeat.experiments import join as join_module
from fedpeat.experiments import serve as serve_module
from fedpeat.federated.flower.keys import make_keys
from rehearse_units import command_of, read_environment, read_unit

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
COMPOSE = yaml.safe_load((DEPLOY / "container" / "compose.yaml").read_text())
DOCKERFILE = (DEPLOY / "container" / "Dockerfile").read_text()
README = (DEPLOY / "README.md").read_text()
SYSTEMD_ANALYZE = shutil.which("systemd-analyze") or ""
PROGRAM = "/opt/fedpeat/bin/fedpeat"

Parsed = Callable[[list[str]], tuple[Any, ...]]


class CalledError(Exception):
    """What a command was called with, instead of being carried out."""


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Parsed:
    """Return a function that gives a command to fedpeat and returns what it would carry out."""

    def called(*arguments: object, **options: object) -> NoReturn:
        raise CalledError(*arguments, options)

    monkeypatch.setattr(serve_module, "serve", called)
    monkeypatch.setattr(join_module, "join", called)
    settings = tmp_path / "server.yaml"
    settings.write_text("name: ours\n")

    def run(words: list[str]) -> tuple[Any, ...]:
        with pytest.raises(CalledError) as ended:
            main([str(settings) if w == "/etc/fedpeat/server.yaml" else w for w in words])
        return ended.value.args

    return run


def unit(name: str) -> dict[str, list[str]]:
    return read_unit(DEPLOY / "systemd" / f"fedpeat-{name}.service")


# --- commands ---------------------------------------------------------------------------------


def test_the_server_unit_goes_on_with_the_run_in_its_state_folder(parsed: Parsed) -> None:
    program, *words = command_of(unit("server"), {})
    config, _, options = parsed(words)
    assert program == PROGRAM
    assert options == {"resume": True, "overwrite": False}
    assert Path(config.output_dir).parent == state_folder("server")
    assert config.fleet.keys == "/etc/fedpeat/server"


def test_the_device_unit_joins_with_what_its_environment_says(parsed: Parsed) -> None:
    environment = read_environment(DEPLOY / "systemd" / "device.env")
    program, *words = command_of(unit("device"), environment)
    server, keys, config, folder, _, _ = parsed(words)
    assert program == PROGRAM
    assert (server, str(keys)) == ("server.example.org:8443", "/etc/fedpeat/device")
    assert config.data.source == "/srv/fedpeat/data.jsonl"
    assert folder.parent == state_folder("device")


def test_the_container_of_the_server_listens_where_its_port_leads(parsed: Parsed) -> None:
    service = COMPOSE["services"]["server"]
    config, _, options = parsed(service["command"])
    assert options == {"resume": True, "overwrite": False}
    assert config.fleet.host == "0.0.0.0"  # noqa: S104 - the container's own network
    assert service["ports"] == [f"8443:{config.fleet.port}"]
    assert f"EXPOSE {config.fleet.port}" in DOCKERFILE
    assert config.output_dir.startswith(mounts("server")["server-state"])
    assert config.fleet.keys == mounts("server")["./etc/server"]


def test_the_container_of_a_device_joins_with_what_is_mounted(parsed: Parsed) -> None:
    words = [with_defaults(word) for word in COMPOSE["services"]["device"]["command"]]
    server, keys, config, folder, _, _ = parsed(words)
    assert server == "server.example.org:8443"
    assert str(keys) == mounts("device")["./etc/device"]
    assert config.data.source == mounts("device")["./data"]
    assert str(folder).startswith(mounts("device")["device-state"])


def state_folder(name: str) -> Path:
    (folder,) = unit(name)["StateDirectory"]
    return Path("/var/lib", folder)


def with_defaults(text: str) -> str:
    """Return text as compose reads it where no variable is set."""
    return re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text)


def mounts(name: str) -> dict[str, str]:
    """Return what a container sees of each folder or volume."""
    volumes = [with_defaults(v) for v in COMPOSE["services"][name]["volumes"]]
    return dict(volume.removesuffix(":ro").split(":") for volume in volumes)


# --- units ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_is_restarted_but_not_where_a_person_must_change_something(path: Path) -> None:
    values = read_unit(path)
    assert values["Restart"] in (["always"], ["on-failure"])
    assert values["RestartPreventExitStatus"] == ["2"]
    assert values["SuccessExitStatus"] == ["130"]
    assert values["KillMode"] == ["mixed"]


def test_a_device_that_crashed_is_back_before_its_round_goes_on_without_it() -> None:
    assert float(unit("device")["RestartSec"][0]) <= 10.0  # it is waited for 20 s


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_may_write_to_its_state_folder_alone_and_gets_no_rights(path: Path) -> None:
    values = read_unit(path)
    assert values["User"] == ["fedpeat"]
    assert values["ProtectSystem"] == ["strict"]
    assert values["NoNewPrivileges"] == ["yes"]
    assert values["CapabilityBoundingSet"] == [""]
    assert "ReadWritePaths" not in values
    (folder,) = values["StateDirectory"]
    assert values["WorkingDirectory"] == [f"/var/lib/{folder}"]
    for line in values["Environment"]:
        places = [word.split("=", 1)[1] for word in line.split() if "=/" in word]
        assert all(place.startswith(f"/var/lib/{folder}") for place in places)


@pytest.mark.skipif(not SYSTEMD_ANALYZE, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_units_and_little_exposed(tmp_path: Path) -> None:
    copies = []
    for path in UNITS:
        copies.append(tmp_path / path.name)
        copies[-1].write_text(path.read_text().replace(PROGRAM, sys.executable))
    for command in (["verify"], ["security", "--offline=true", "--threshold=20", "--no-pager"]):
        done = subprocess.run(
            [SYSTEMD_ANALYZE, *command, *copies], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not done.stderr


def test_a_certificate_for_another_host_also_serves_the_programs_beside_the_server(
    tmp_path: Path,
) -> None:
    make_keys(tmp_path, ["server.example.org"], ["ann"])
    certificate = x509.load_pem_x509_certificate((tmp_path / "server" / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example.org"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1")]


# --- compose file and image -----------------------------------------------------------------------

SERVICE_KEYS = {  # of the Compose specification, those that this file needs
    *("image", "build", "init", "read_only", "cap_drop", "security_opt", "tmpfs"),
    *("stop_grace_period", "profiles", "command", "environment", "ports", "volumes", "restart"),
}


def test_the_compose_file_has_the_form_of_the_specification() -> None:
    known = {"services", "volumes", "x-common"}
    assert set(COMPOSE) == known
    for name, service in COMPOSE["services"].items():
        assert set(service) <= SERVICE_KEYS
        assert service["profiles"] == [name]
        assert all(isinstance(word, str) for word in service["command"])
        assert all(isinstance(v, str) for v in service.get("environment", {}).values())
        assert re.fullmatch(r"always|unless-stopped|on-failure(:\d+)?", service["restart"])
        volumes = [source for source in mounts(name) if not source.startswith((".", "/"))]
        assert set(volumes) <= set(COMPOSE["volumes"])


def test_containers_run_without_rights_on_a_file_system_that_is_read_only() -> None:
    for service in COMPOSE["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", DOCKERFILE, re.MULTILINE)


def test_the_image_is_built_from_files_that_are_there_and_starts_fedpeat() -> None:
    build = COMPOSE["x-common"]["build"]
    root = (DEPLOY / "container" / build["context"]).resolve()
    assert (root / build["dockerfile"]).samefile(DEPLOY / "container" / "Dockerfile")
    sources = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    names = [name for line in sources for name in line.split()]
    ignored = (DEPLOY / "container" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "src" in names
    assert all((root / name).exists() and f"!{name}" in ignored for name in names)
    assert f'ENTRYPOINT ["{PROGRAM}"]' in DOCKERFILE


# --- the page ---------------------------------------------------------------------------------


def test_every_place_that_units_and_containers_name_is_on_the_page() -> None:
    files = [*UNITS, DEPLOY / "container" / "compose.yaml"]
    places = {
        place
        for path in files
        for place in re.findall(r"/etc/fedpeat/[a-z.]+|\./etc/[a-z.]+", path.read_text())
    }
    missing = [place for place in places if place.removeprefix("./") not in README]
    assert len(places) >= 5
    assert not missing
    assert all(str(state_folder(name)) in README for name in ("server", "device"))


def test_every_file_that_the_page_installs_is_there() -> None:
    named = set(re.findall(r"deploy/[\w./-]+\.\w+", README))
    assert {path.name for path in (DEPLOY / "systemd").iterdir()} <= {Path(n).name for n in named}
    assert all((DEPLOY.parent / name).exists() for name in named)
