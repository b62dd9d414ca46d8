"""A device of a fleet: its data and emulators in this process, Flower's programs beside it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, get_args

import torch

from fedpeat.config import schema
from fedpeat.config.loading import differences
from fedpeat.config.schema import (
    Config,
    DataConfig,
    FederatedConfig,
    FleetConfig,
    ModelConfig,
    PrivacyConfig,
)
from fedpeat.core.errors import ConfigError, DataError, FleetError, WireError
from fedpeat.core.noise import NoiseSource
from fedpeat.core.run_folder import kept_secret, storage_errors
from fedpeat.core.run_lock import take_lock
from fedpeat.data.examples import Examples
from fedpeat.data.files import expand_home, find_files, looks_like_path
from fedpeat.data.image_files import is_archive
from fedpeat.experiments.fleet_folder import free_port, secret_file
from fedpeat.experiments.security import own_side
from fedpeat.experiments.tasks import TASKS
from fedpeat.federated.flower.cache import PartCache
from fedpeat.federated.flower.keys import DeviceKeys, device_keys
from fedpeat.federated.flower.knock import knock
from fedpeat.federated.flower.processes import (
    Program,
    Supervisor,
    end_on_sigterm,
    environment,
    tool,
)
from fedpeat.federated.flower.recall import Recalling
from fedpeat.federated.flower.socket_link import SOCKET_KEY
from fedpeat.federated.flower.worker import Device, serve_device
from fedpeat.federated.shelf import EmulatorShelf
from fedpeat.model.loading import resolve_device, resolve_dtype

__all__ = ["join", "reader"]

_LOOK_SECONDS = 0.5
_KNOCK_SECONDS = 3.0
_MAX_FILES = 64
_SHARED = ("block_size", "max_tokens_per_client", "max_examples_per_client")
"""Settings of data that are the same on all devices."""

Say = Callable[[str], object]


def join(server: str, keys: Path, config: Config, folder: Path, say: Say) -> None:
    """Take part in a federation until told to end.

    Args:
        server: Where the server is, "HOST:PORT".
        keys: Folder with the device's keys, as ``fedpeat keys`` makes it.
        config: Settings, of which ``data`` says what the device has, ``model.device`` and
            ``model.dtype`` how it computes, ``privacy.example_noise_multiplier`` with how little
            noise it tunes, and ``federated.secure_*`` whether it masks its updates, and among how
            many.
        folder: Where emulators and logs are kept, for the next time too.
        say: Is told what happens.

    Raises:
        FedPEATError: If address, keys or settings do not fit.
    """
    host, port = _place(server)
    _require_own_settings(config)
    own = device_keys(keys)
    _require_data(config.data.source)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    lock = _taken(folder)
    place = resolve_device(config.model.device)
    shelf = EmulatorShelf(place, resolve_dtype(config.model.dtype, place))
    cache = PartCache(folder / "parts", server, own.ca)
    device = Device(
        own.name,
        cache,
        shelf,
        reader(config, own.name),
        say,
        own_side(config, own.name, own.ca, own.key, own.certificate),
        max_emulator_bytes=config.fleet.max_emulator_bytes,
        noise=NoiseSource(kept_secret(folder / "noise.key")),
        least_noise=config.privacy.example_noise_multiplier,
    )
    path = (folder / "worker.socket").absolute()
    recalling = Recalling(device, folder, say)
    recalling.recall()
    worker = threading.Thread(target=serve_device, args=(path, recalling, say), daemon=True)
    worker.start()
    end_on_sigterm()
    supervisor = Supervisor(_programs(server, own, folder.absolute(), path), say)
    try:
        _wait_for_server(host, port, own.ca, say)
        say(f"{own.name} joins {server}")
        while worker.is_alive():
            supervisor.look()
            time.sleep(_LOOK_SECONDS)
        raise FleetError(f"{own.name} cannot answer any more; start it again")
    finally:
        supervisor.stop()
        lock.close()


def _taken(folder: Path) -> IO[str]:
    """Make a device's folder and take its lock, which ends with this process.

    Raises:
        ConfigError: If another process has it: two would take each other's socket.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        try:
            return take_lock(folder)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder} is in use by another device; give each a --folder of its own"
            ) from error


def _place(server: str) -> tuple[str, int]:
    """Return the host and the port of a server."""
    host, _, port = server.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5
    if not host or not is_port or not 1 <= int(port) <= 65535:
        raise ConfigError(f"the server must be HOST:PORT, got {server!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _require_own_settings(config: Config) -> None:
    """Refuse settings that are not a device's to make.

    Raises:
        ConfigError: If there is one.
    """
    model, most, fed = config.model, config.fleet.max_emulator_bytes, config.federated
    own = Config(
        data=config.data,
        model=ModelConfig(device=model.device, dtype=model.dtype),
        federated=FederatedConfig(
            secure_aggregation=fed.secure_aggregation, secure_min_devices=fed.secure_min_devices
        ),
        fleet=FleetConfig(max_emulator_bytes=most),
        privacy=PrivacyConfig(example_noise_multiplier=config.privacy.example_noise_multiplier),
        num_threads=config.num_threads,
    )
    for name in differences(own, config):
        raise ConfigError(
            f"{name} is the run's, which the server decides; a device's own settings are data.*, "
            "model.device, model.dtype, num_threads, fleet.max_emulator_bytes, "
            "federated.secure_aggregation, federated.secure_min_devices and "
            "privacy.example_noise_multiplier"
        )


def _wait_for_server(host: str, port: int, ca: Path, say: Say) -> None:
    """Knock until the server answers, and say why it does not.

    Raises:
        ConfigError: If somebody else answers.
    """
    said = ""
    while reason := knock(host, port, ca):
        if reason != said:
            say(f"no server at {host}:{port}: {reason}; trying on")
            said = reason
        time.sleep(_KNOCK_SECONDS)


def _require_data(source: str) -> None:
    """Refuse a path without files now: how they are to be read, only the server says.

    Raises:
        DataError: If there are none.
    """
    if looks_like_path(source) and not is_archive(source):
        path = expand_home(source)
        if not path.is_dir() or not any(path.iterdir()):
            find_files(source)


def _programs(server: str, keys: DeviceKeys, folder: Path, path: Path) -> list[Program]:
    secret, address = str(secret_file(folder / "tasks.secret")), f"127.0.0.1:{free_port()}"
    env = environment(folder / "home")
    ca, key, log = str(keys.ca.absolute()), str(keys.key.absolute()), folder / "logs/supernode.log"
    supernode = [
        *(sys.executable, "-m", "fedpeat.federated.flower.node", str(log), server, ca, key),
        *(tool("flower-supernode"), "--superlink", server),
        *("--root-certificates", ca, "--auth-supernode-private-key", key),
        *("--isolation", "process", "--superexec-auth-secret-file", secret),
        *("--host", "127.0.0.1", "--port", address.split(":")[1]),
        *("--node-config", f'{SOCKET_KEY}="{path}"'),
    ]
    superexec = [
        *(tool("flower-superexec"), "--insecure", "--runtime-api-address", address),
        *("--superexec-auth-secret-file", secret),
    ]
    return [
        Program("supernode", supernode, env, log),
        Program(
            "superexec",
            superexec,
            env,
            log.with_name("superexec.log"),
            takes_along=("supernode",),  # which would wait for a ClientApp that has ended
        ),
    ]


def reader(
    config: Config, name: str
) -> Callable[[Mapping[str, Any], Mapping[str, bytes]], Examples]:
    """Return what reads the device's data, as a welcome says and its own settings."""

    def read(welcome: Mapping[str, Any], files: Mapping[str, bytes]) -> Examples:
        try:
            task = TASKS[welcome["task"]]
            shared = {key: welcome[key] for key in _SHARED}
            data = replace(config.data, **shared)
        except (KeyError, TypeError) as error:
            raise WireError(
                f"not a welcome: it lacks {error}; tasks are {', '.join(get_args(schema.Task))}"
            ) from error
        _require_same(config.data, data)
        return task.read_own(data, _processor(task.load_processor, files), welcome, name)

    return read


def _require_same(own: DataConfig, shared: DataConfig) -> None:
    """Refuse a device's settings that are not those of the run.

    Raises:
        DataError: If there is one.
    """
    for name in _SHARED:
        given, wanted = getattr(own, name), getattr(shared, name)
        if given not in {getattr(DataConfig(), name), wanted}:
            raise DataError(f"data.{name} must be {wanted}, as in the run, got {given}")


def _processor(load: Callable[..., Any], files: Mapping[str, bytes]) -> Any:
    """Return a tokenizer or image processor from its files, none of which may be code."""
    names = [name for name in files if Path(name).name != name or name.endswith(".py")]
    if names or len(files) > _MAX_FILES:
        raise WireError(f"a welcome's files must be plain names without code, got {names[:3]}")
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return load(folder)
