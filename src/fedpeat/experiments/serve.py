"""The server side of a fleet, started and kept running: SuperLink, gate, and the run itself."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedpeat.config.loading import config_to_yaml
from fedpeat.config.schema import Config
from fedpeat.core.errors import AggregationError, ConfigError, FleetError
from fedpeat.core.run_folder import RunFolder, storage_errors, write_atomically
from fedpeat.core.run_lock import is_locked
from fedpeat.experiments.fleet_folder import FLEET_VARIABLE, FleetFolder
from fedpeat.experiments.methods import METHODS
from fedpeat.experiments.news import NewsReader
from fedpeat.experiments.run import check_same_run
from fedpeat.federated.flower.gate import GateSettings
from fedpeat.federated.flower.keys import ServerKeys, server_keys
from fedpeat.federated.flower.processes import (
    Program,
    Supervisor,
    end_on_sigterm,
    environment,
    tool,
)
from fedpeat.report.status_server import StatusServer

__all__ = ["live_page", "serve"]

_LINK = "fleet"
_LOOK_SECONDS = 0.5
_START_SECONDS = 120.0
_SUBMIT_SECONDS = 120.0  # from a submission to the process that runs it
_ASK_SECONDS = 20.0  # between questions whether a run without a process is over
_AGAIN_SECONDS = 5.0
_MOST_TRIES = 6
_MOST_SUBMISSIONS = 5  # without a round in between
_KEY_IS_KNOWN = "already in use"

Say = Callable[[str], object]


def serve(config: Config, say: Say, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Run what the settings describe on devices that join, and leave a run folder.

    Args:
        config: All settings.
        say: Is told what happens.
        resume: Go on with the run that the folder holds, if it holds one.
        overwrite: Start anew, whatever the folder holds.

    Returns:
        The run folder.

    Raises:
        FedPEATError: If keys, port or settings do not fit, or the run failed.
    """
    _require_for_a_fleet(config)
    keys = server_keys(Path(config.fleet.keys))
    folder = Path(config.output_dir) / config.name
    fleet = FleetFolder(folder.with_name(f"{folder.name}-fleet").absolute())
    _prepare(config, keys, fleet, RunFolder(folder), resume=resume, overwrite=overwrite)
    _require_free(config.fleet.host, config.fleet.port)
    end_on_sigterm()
    superlink, *others = _programs(config, keys, fleet)
    supervisor = Supervisor([superlink], say)
    try:
        with live_page(config, folder, say):
            _wait_until_healthy(supervisor, fleet, keys)
            _register(fleet, keys, supervisor, say)
            supervisor.add(others)  # the gate opens once all who may come in are known
            say(f"open for devices on {config.fleet.host}:{config.fleet.port}")
            _see_through(fleet, folder, supervisor, say)
    finally:
        supervisor.stop()
    return folder


def live_page(config: Config, folder: Path, say: Say) -> AbstractContextManager[object]:
    """Return the page that shows the run as it goes, once it is entered, and say where it is."""
    if config.fleet.status_port is None:
        return nullcontext()
    token = os.environ.get("FEDPEAT_STATUS_TOKEN")
    host, port = config.fleet.status_host, config.fleet.status_port
    page = StatusServer(folder, host, port, token, must_be_run=False)
    say(f"live page: {page.url}")
    if page.is_open:
        say("others can reach it, and what is sent is not encrypted; who has the token sees all")
    return page


def _require_for_a_fleet(config: Config) -> None:
    fed = config.federated
    if fed.round_deadline_seconds is None:
        raise ConfigError(
            "federated.round_deadline_seconds must be given for a fleet, where a device may never "
            "answer, got None"
        )
    if config.method == "local" or METHODS[config.method].pools_data:
        allowed = [
            name for name, plan in METHODS.items() if name != "local" and not plan.pools_data
        ]
        raise ConfigError(
            f"method must be one of {', '.join(allowed)} on a fleet, got {config.method}"
        )
    if config.privacy.noise != "secret":
        raise ConfigError(
            "privacy.noise must be secret on a fleet, whose devices draw noise from keys of their "
            f"own, got {config.privacy.noise}"
        )


def _prepare(
    config: Config,
    keys: ServerKeys,
    fleet: FleetFolder,
    run_folder: RunFolder,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    begun = run_folder.has_run()
    if begun and not (resume or overwrite):
        raise ConfigError(
            f"{run_folder.path} already holds a run; --resume goes on, --overwrite starts anew"
        )
    settings = replace(config, output_dir=str(Path(config.output_dir).absolute()))
    if begun and not overwrite:
        check_same_run(run_folder, settings)
    if begun and overwrite:
        run_folder.create()
        run_folder.clear()
        run_folder.close()
    with storage_errors(fleet.path):
        fleet.path.mkdir(parents=True, exist_ok=True)
        fleet.path.chmod(0o700)
        fleet.home.mkdir(exist_ok=True)
        fleet.outcome.unlink(missing_ok=True)
        fleet.news.unlink(missing_ok=True)
    write_atomically(fleet.config, config_to_yaml(settings))
    write_atomically(fleet.ca, keys.ca.read_text())
    write_atomically(fleet.devices, json.dumps(sorted(keys.devices)))
    fleet.write_app()
    link = f'[superlink.{_LINK}]\naddress = "127.0.0.1:{fleet.superlink_port()}"\n'
    link += f'root-certificates = "{keys.ca.absolute()}"\n'
    write_atomically(fleet.home / "config.toml", link)


def _require_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"fleet.port must be one that nobody uses on {host}, got {port}: {error.strerror}"
        ) from error


def _programs(config: Config, keys: ServerKeys, fleet: FleetFolder) -> list[Program]:
    address = f"127.0.0.1:{fleet.superlink_port()}"
    ca, certificate, key = (str(p.absolute()) for p in (keys.ca, keys.certificate, keys.key))
    gate = GateSettings(
        host=config.fleet.host,
        port=config.fleet.port,
        superlink=address,
        ca=ca,
        certificate=certificate,
        key=key,
        parts=str(fleet.parts),
        secret=str(fleet.parts_secret),
        bell=str(fleet.bell),
    )
    gate_file = fleet.path / "gate.json"
    write_atomically(gate_file, json.dumps(asdict(gate)))
    secret = str(fleet.tasks_secret)
    env = environment(fleet.home, **{FLEET_VARIABLE: str(fleet.path)})
    superlink = [
        *(tool("flower-superlink"), "--host", "127.0.0.1", "--port", address.split(":")[1]),
        *("--isolation", "process", "--superexec-auth-secret-file", secret),
        *("--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key),
        *("--enable-supernode-auth", "--database", str(fleet.state)),
        "--disable-runtime-dependency-installation",
    ]
    superexec = [
        *(tool("flower-superexec"), "--runtime-api-address", address),
        *("--root-certificates", ca, "--superexec-auth-secret-file", secret),
    ]
    own_gate = [sys.executable, "-m", "fedpeat.federated.flower.gate", str(gate_file)]
    return [
        Program("superlink", superlink, env, fleet.log("superlink")),
        Program("gate", own_gate, env, fleet.log("gate")),
        Program("superexec", superexec, env, fleet.log("superexec")),
    ]


def _wait_until_healthy(supervisor: Supervisor, fleet: FleetFolder, keys: ServerKeys) -> None:
    context = ssl.create_default_context(cafile=keys.ca)
    url = f"https://127.0.0.1:{fleet.superlink_port()}/health"
    start = time.monotonic()
    while time.monotonic() - start < _START_SECONDS:
        supervisor.look()
        try:
            with urllib.request.urlopen(url, timeout=5, context=context):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(_LOOK_SECONDS)
    raise FleetError(
        f"the SuperLink did not come up in {_START_SECONDS:g} s; see {fleet.log('superlink')}"
    )


def _register(fleet: FleetFolder, keys: ServerKeys, supervisor: Supervisor, say: Say) -> None:
    """Tell the SuperLink the keys of devices that it does not know yet."""
    known = json.loads(fleet.registered.read_text()) if fleet.registered.exists() else []
    for name, key in keys.devices.items():
        if name not in known:
            _register_one(fleet, name, key, supervisor, say)
            known.append(name)
            write_atomically(fleet.registered, json.dumps(known))
    say(f"{len(known)} devices may join: {', '.join(known[:8])}{' ...' if len(known) > 8 else ''}")


def _register_one(
    fleet: FleetFolder, name: str, key: Path, supervisor: Supervisor, say: Say
) -> None:
    """Register a device, again if the SuperLink goes away meanwhile."""
    for attempt in range(_MOST_TRIES):
        try:
            command = ["supernode", "register", str(key.absolute()), _LINK, "--name", name]
            _flwr(fleet, command)
        except FleetError as error:
            if _KEY_IS_KNOWN in str(error):  # told before, and killed before that was written down
                return
            if attempt == _MOST_TRIES - 1:
                raise
            say(f"{error}; trying again")
            _stand_by(supervisor, _AGAIN_SECONDS)
        else:
            return


def _stand_by(supervisor: Supervisor, seconds: float) -> None:
    """Wait, and keep the programs running meanwhile."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        supervisor.look()
        time.sleep(_LOOK_SECONDS)


def _flwr(fleet: FleetFolder, arguments: list[str]) -> Any:
    """Return what a command of Flower answers, as JSON.

    Raises:
        FleetError: If it fails, or does not end.
    """
    try:
        done = subprocess.run(  # noqa: S603 - our own list of arguments
            [tool("flwr"), *arguments, "--format", "json"],
            env=environment(fleet.home),
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise FleetError(f"flwr {arguments[0]} took more than {_START_SECONDS:g} s") from error
    text = done.stdout[done.stdout.find("{") :]
    try:
        answer = json.loads(text)
    except ValueError:
        answer = {"success": False, "error-message": (done.stdout + done.stderr)[-300:]}
    if not answer.get("success"):
        reason = " ".join(str(answer.get("error-message")).split())
        raise FleetError(f"flwr {arguments[0]} failed: {reason}")
    return answer


def _see_through(fleet: FleetFolder, folder: Path, supervisor: Supervisor, say: Say) -> None:
    """Submit the run, again whenever its process is gone, until it has ended."""
    submission, news = _Submission(fleet), NewsReader(fleet.news)
    num_submissions, last_round = 0, -1
    while True:
        supervisor.look()
        is_over = fleet.outcome.exists()
        for text in news.new():
            say(text)
        if is_over:
            outcome = json.loads(fleet.outcome.read_text())
            if outcome["exit_code"] == 0:
                return
            fleet.outcome.unlink()
            if outcome["exit_code"] == ConfigError.exit_code:
                raise ConfigError(outcome["error"])
            say(f"the run stopped: {outcome['error']}")
        server_round = _last_round(folder)
        if server_round > last_round:
            last_round, num_submissions = server_round, 0
        if _is_alive(fleet, folder):
            submission.came_up()
        elif submission.is_lost():
            if num_submissions == _MOST_SUBMISSIONS:
                raise AggregationError(
                    f"the run ended {num_submissions} times without a round; see {folder}/log.txt "
                    f"and {fleet.log('superexec')}"
                )
            num_submissions += 1
            try:
                submission.submit()
                say("the run is submitted")
            except FleetError as error:  # the SuperLink may have ended just now
                say(f"{error}; trying again")
        time.sleep(_LOOK_SECONDS)


class _Submission:
    """A run handed to Flower, which starts a process for it some time later.

    Args:
        fleet: Where Flower's files are.
    """

    def __init__(self, fleet: FleetFolder) -> None:
        self._fleet = fleet
        self._run_id: str | None = None
        self._asked_at = 0.0
        self._again_at = 0.0

    def submit(self) -> None:
        """Submit the run.

        Raises:
            FleetError: If that cannot be; another try is due in a while.
        """
        self._run_id, self._again_at = None, time.monotonic() + _AGAIN_SECONDS
        self._stop_last()
        answer = _flwr(self._fleet, ["run", str(self._fleet.app), _LINK])
        self._run_id = str(answer.get("run-id"))
        write_atomically(self._fleet.submitted, json.dumps({"run_id": self._run_id}))
        self._asked_at = time.monotonic()
        self._again_at = self._asked_at + _SUBMIT_SECONDS

    def _stop_last(self) -> None:
        """Stop the run before, of which the SuperLink does not know for a minute that it is dead.

        Devices would wait as long for the rest of a message that it was sending.
        """
        try:
            run_id = json.loads(self._fleet.submitted.read_text())["run_id"]
            _flwr(self._fleet, ["stop", str(run_id), _LINK])
        except (FleetError, OSError, ValueError, KeyError):  # it has ended by itself
            return

    def came_up(self) -> None:
        """Note that its process is there: if that goes away, the run is lost at once."""
        self._run_id, self._again_at = None, 0.0

    def is_lost(self) -> bool:
        """Say whether the run, whose process is not there, must be submitted (again).

        A process that dies before it has said that it is there is known only to the SuperLink.
        """
        now = time.monotonic()
        if now >= self._again_at:
            return True
        if self._run_id is None or now - self._asked_at < _ASK_SECONDS:
            return False
        self._asked_at = now
        try:
            answer = _flwr(self._fleet, ["list", _LINK, "--run-id", self._run_id])
        except FleetError:
            return False
        return any(str(run.get("status")).startswith("finished") for run in answer["runs"])


def _last_round(folder: Path) -> int:
    rounds = [
        int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("round-*[0-9]")
    ]
    return max(rounds, default=0)


def _is_alive(fleet: FleetFolder, folder: Path) -> bool:
    """Say whether the process that runs the rounds is there."""
    if is_locked(folder):
        return True
    try:
        pid = int(json.loads(fleet.process.read_text())["pid"])
        os.kill(pid, 0)
        command = Path(f"/proc/{pid}/cmdline")
        return not command.exists() or b"serverapp" in command.read_bytes()
    except (OSError, ValueError, KeyError):
        return False
