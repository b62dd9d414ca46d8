"""A device of a fleet: it is welcomed, fetches its emulator, tunes, and outlives any message."""

from __future__ import annotations

import json
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from fedpeat.config.loading import config_from_dict, override
from fedpeat.config.schema import Config, DataConfig
from fedpeat.core.errors import DataError, WireError
from fedpeat.core.noise import NoiseSource
from fedpeat.core.version import VERSION
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.data.examples import Examples
from fedpeat.experiments.bench import Fleet
from fedpeat.experiments.join import reader
from fedpeat.experiments.run import run
from fedpeat.experiments.shards import write_shards
from fedpeat.federated.flower.cache import PartCache
from fedpeat.federated.flower.depot import Depot
from fedpeat.federated.flower.keys import ServerKeys
from fedpeat.federated.flower.socket_link import ask
from fedpeat.federated.flower.worker import Device, serve_device
from fedpeat.federated.in_process import InProcessTransport
from fedpeat.federated.shelf import EmulatorShelf
from fleet.doors import Door, keys_in, open_gate
from tiny import (
    CLASSES,
    random_text,
    tiny_image_settings,
    tiny_processor,
    tiny_settings,
    tiny_vit,
)

HELLO = encode(Payload(record={"version": VERSION, "welcome": "w"}))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> ServerKeys:
    return keys_in(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def door(keys: ServerKeys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with open_gate(tmp_path_factory.mktemp("gate"), keys, keys) as door:
        yield door


class Site:
    """A device's machine: its folder, and what its person sees."""

    def __init__(
        self,
        name: str,
        door: Door,
        folder: Path,
        read: Any,
        limit: int | None = None,
        noise: NoiseSource | None = None,
    ):
        self.said: list[str] = []
        cache = PartCache(folder / name, f"localhost:{door.port}", Path(door.settings.ca))
        shelf = EmulatorShelf(torch.device("cpu"), torch.float32)
        self.device = Device(
            name, cache, shelf, read, self.said.append, max_emulator_bytes=limit, noise=noise
        )


def some_text(_: Mapping[str, Any], __: Mapping[str, bytes]) -> Examples:
    return random_text(num_blocks=5)


@pytest.fixture
def site(door: Door, tmp_path: Path) -> Site:
    return Site("ann", door, tmp_path, some_text)


def config_of(model_dir: Path, corpus_file: Path, folder: Path, **changes: Any) -> Config:
    return config_from_dict({**tiny_settings(model_dir, corpus_file, folder), **changes})


def on_devices(
    config: Config, door: Door, folder: Path, limits: Mapping[str, int] | None = None
) -> tuple[dict[str, Any], dict[str, Site]]:
    """Run a federation on devices that have everything of a real one but the network."""
    shards = write_shards(config, folder / "shards")
    sites = {}
    for path in shards:
        own = replace(config, data=DataConfig(source=str(path)))
        limit = (limits or {}).get(path.stem)
        sites[path.stem] = Site(path.stem, door, folder, reader(own, path.stem), limit)
    transport = InProcessTransport({name: site.device.handle for name, site in sites.items()})
    offer = Depot(door.parts, door.secret).offer
    summary = run(config, fleet=Fleet(transport, offer, tuple(sites)))
    return summary, sites


def assert_same_on_devices(config: Config, door: Door, folder: Path) -> dict[str, Site]:
    """Run a federation in process and on devices, see one adapter come of both; return these."""
    run(replace(config, output_dir=str(folder / "simulated")))
    _, sites = on_devices(replace(config, output_dir=str(folder / "fleet")), door, folder)
    tuned, wanted = (
        [path.read_bytes() for path in sorted((folder / where).glob("tiny/adapter/*.safetensors"))]
        for where in ("fleet", "simulated")
    )
    assert tuned == wanted
    assert len(tuned) == 1
    return sites


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_devices_tune_the_adapter_that_simulated_ones_do_bit_for_bit(
    model_dir: Path, corpus_file: Path, door: Door, tmp_path: Path
) -> None:
    rounds = {"num_rounds": 2}
    config = config_of(model_dir, corpus_file, tmp_path, federated=rounds)
    sites = assert_same_on_devices(config, door, tmp_path)
    for site in sites.values():
        assert site.said[0].startswith("welcomed; ")
        assert site.said[1].startswith("holds emulator ")
        assert site.said[2:] == [f"round {number}: tuning" for number in (1, 2)]
    first, *others = rounds_of(tmp_path / "fleet" / "tiny")[1:]
    assert all(p["bytes_emulator"] > 0 for p in first["participants"] if p["role"] == "device")
    assert all(p["bytes_emulator"] == 0 for line in others for p in line["participants"])


@pytest.mark.parametrize(
    "changes",
    [
        {
            "server": {"realign_every": 1, "realign_tokens": 512, "realign_rank": 2},
            "emulator": {"distill_batch_size": 4},
        },
        {
            "emulator": {"recipe": "layer_drop:0.75", "lower_rungs": [0.5]},
            "federated": {"client_rungs": [0.5, 0.75]},
        },
        {"federated": {"client_ranks": [1, 2], "lora_aggregation": "svd"}},
        {"federated": {"update_codec": "int8", "robust_rule": "median", "max_rejections": 2}},
        {"adapter": {"placement": "all"}, "emulator": {"recipe": "width:0.5"}},
        {"adapter": {"method": "prompt"}},
        {"method": "fed_ft"},
    ],
    ids=["alignment", "ladder", "ranks", "codec and rule", "width", "prompt", "fed_ft"],
)
def test_what_is_tuned_on_devices_is_what_is_tuned_in_process(
    changes: dict[str, Any], model_dir: Path, corpus_file: Path, door: Door, tmp_path: Path
) -> None:
    config = config_of(model_dir, corpus_file, tmp_path, federated={"num_rounds": 3})
    assert_same_on_devices(override(config, changes), door, tmp_path)
    accepted = {
        p["status"] for line in rounds_of(tmp_path / "fleet/tiny") for p in line["participants"]
    }
    assert accepted == {"accepted"}


def test_a_controllers_plans_work_on_devices_as_on_simulated_ones(
    model_dir: Path, corpus_file: Path, door: Door, tmp_path: Path
) -> None:
    config = config_of(
        model_dir,
        corpus_file,
        tmp_path,
        federated={"num_rounds": 6},
        emulator={"recipe": "layer_drop:0.75", "lower_rungs": [0.5, 0.25]},
        world={"preset": "mixed"},
        controller={"kind": "random", "local_steps": [1, 3], "server_steps": [0, 2]},
    )
    assert_same_on_devices(config, door, tmp_path)
    lines, wanted = (rounds_of(tmp_path / where / "tiny") for where in ("fleet", "simulated"))
    for line, other in zip(lines, wanted, strict=True):  # the text measured is the server's here
        assert line["simulated"] == pytest.approx(other["simulated"], rel=1e-3)
    assert len({p["rung"] for line in lines for p in line["participants"]}) > 2


def test_devices_number_classes_as_the_server_does_and_not_by_those_they_have(
    images_dir: Path, door: Door, tmp_path: Path
) -> None:
    vit = tmp_path / "vit"  # it has no names for its classes
    model = tiny_vit()
    model.config.id2label = {number: f"LABEL_{number}" for number in range(len(CLASSES))}
    model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    model.save_pretrained(vit)
    tiny_processor().save_pretrained(vit)
    settings = tiny_image_settings(vit, images_dir, tmp_path)
    few_kinds = {"source": str(images_dir), "partition": "dirichlet", "alpha": 0.05}
    config = config_from_dict({**settings, "data": {**few_kinds, "num_clients": 4}})
    sites = assert_same_on_devices(config, door, tmp_path)
    kinds = [sorted(p.name for p in (tmp_path / "shards" / name).iterdir()) for name in sites]
    assert any(own != list(CLASSES)[: len(own)] for own in kinds), "each has the first ones"


def test_a_device_with_a_class_that_the_server_does_not_know_is_told_so(
    images_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(images_dir / "dot", tmp_path / "new" / "line")
    own = replace(Config(), data=DataConfig(source=str(tmp_path / "new")))
    processor = tmp_path / "processor"
    tiny_processor().save_pretrained(processor)
    files = {path.name: path.read_bytes() for path in processor.iterdir()}
    welcome = {
        "task": "image_classification",
        "labels": {"0": "bar", "1": "dot"},
        "num_channels": 1,
        "block_size": 16,
        **dict.fromkeys(["max_tokens_per_client", "max_examples_per_client"]),
    }
    with pytest.raises(DataError, match="the model has no class for 'line'; its 2 are bar, dot"):
        reader(own, "ann")(welcome, files)


def test_a_task_that_comes_twice_is_done_once(
    model_dir: Path, corpus_file: Path, door: Door, tmp_path: Path
) -> None:
    config = config_of(model_dir, corpus_file, tmp_path / "runs", federated={"num_rounds": 1})
    messages: list[tuple[str, str, bytes]] = []
    with mock.patch.object(InProcessTransport, "submit", noting(messages)):
        _, sites = on_devices(config, door, tmp_path)
    name, task = next((name, content) for kind, name, content in messages if kind == "train")
    (hold,) = (c for kind, n, c in messages if (kind, n) == ("hold", name))
    site = sites[name]
    said = len(site.said)
    first = site.device.handle("train", task)
    assert site.device.handle("train", task) is first
    assert site.said[said:] == []
    other = Payload(decode(task).arrays, {**decode(task).record, "server_round": 2})
    site.device.handle("train", encode(other))
    site.device.handle("train", task)
    assert site.said[said:] == ["round 2: tuning", "round 1: tuning"]
    site.device.handle("hold", hold)  # the answer tells what is held
    site.device.handle("train", task)
    assert site.said[-1] == "round 1: tuning"


def test_a_device_that_was_started_anew_does_a_task_again_with_the_same_noise(
    model_dir: Path, corpus_file: Path, door: Door, tmp_path: Path
) -> None:
    config = config_of(
        model_dir,
        corpus_file,
        tmp_path / "runs",
        federated={"num_rounds": 1},
        privacy={"example_noise_multiplier": 1.0},
    )
    messages: list[tuple[str, str, bytes]] = []
    with mock.patch.object(InProcessTransport, "submit", noting(messages)):
        on_devices(config, door, tmp_path)
    own = replace(Config(), data=DataConfig(source=str(tmp_path / "shards/site-0.jsonl")))

    def update(key: bytes) -> dict[str, np.ndarray]:
        """Return the update of a device that was just started, to all that the run asked."""
        site = Site("site-0", door, tmp_path, reader(own, "site-0"), noise=NoiseSource(key))
        answers = [site.device.handle(kind, c) for kind, node, c in messages if node == "site-0"]
        return dict(decode(answers[-1]).arrays)

    assert messages[-1][0] == "train"
    first, again, other = update(bytes(32)), update(bytes(32)), update(bytes([1] * 32))
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


def noting(messages: list[tuple[str, str, bytes]]) -> Callable[..., dict[str, str]]:
    """Return a way to send tasks that notes them, too: kind, node and content."""
    submit = InProcessTransport.submit

    def noted(
        self: InProcessTransport, kind: str, tasks: Mapping[str, bytes], seconds: float | None
    ) -> dict[str, str]:
        messages.extend((kind, node, content) for node, content in tasks.items())
        return submit(self, kind, tasks, seconds)

    return noted


def test_a_device_that_can_hold_no_rung_is_told_so_and_the_others_go_on(
    model_dir: Path, corpus_file: Path, door: Door, tmp_path: Path
) -> None:
    config = config_of(model_dir, corpus_file, tmp_path, federated={"num_rounds": 1})
    on_devices(config, door, tmp_path, limits={"site-1": 1000})
    line = rounds_of(tmp_path / "tiny")[-1]
    status = {p["client_id"]: p["status"] for p in line["participants"]}
    assert status == {
        "server": "accepted",
        "site-0": "accepted",
        "site-1": "failed",
        "site-2": "accepted",
        "site-3": "accepted",
    }
    (reason,) = [p["reason"] for p in line["participants"] if p["client_id"] == "site-1"]
    assert "site-1 can hold an emulator of at most 1,000 bytes, this one has " in reason
    assert "it waits for a smaller rung" in reason
    assert not list((tmp_path / "site-1").iterdir()), "nothing is fetched"


def test_a_device_is_asked_for_nothing_but_its_name_before_it_is_welcomed(site: Site) -> None:
    record = decode(site.device.handle("hello", HELLO)).record
    assert record == {"client_id": "ann", "welcome": ""}
    for kind in ("train", "hold", "nonsense"):
        with pytest.raises(WireError, match="ann has not been welcomed yet"):
            site.device.handle(kind, encode(Payload()))


def test_versions_that_differ_are_both_named_on_both_sides(site: Site) -> None:
    hello = encode(Payload(record={"version": "9.9.9", "welcome": "w"}))
    text = f"the server runs fedpeat '9.9.9', this device {VERSION}"
    with pytest.raises(WireError, match=text):
        site.device.handle("hello", hello)
    assert site.said == [f"refused: {text}"]


def test_a_welcome_of_another_run_makes_a_device_new_again(site: Site) -> None:
    site.device.handle("welcome", encode(Payload(record={"welcome": "w"})))
    assert decode(site.device.handle("hello", HELLO)).record["num_examples"] == 5
    other = encode(Payload(record={"version": VERSION, "welcome": "another"}))
    assert decode(site.device.handle("hello", other)).record == {"client_id": "ann", "welcome": "w"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "must list its parts, got None"),
        ({"manifest": {"parts": 7}}, "must list its parts"),
        ({"manifest": {"parts": [{"sha256": "x"}]}}, "must have sha256 and num_bytes"),
        ({"manifest": {"parts": []}}, "fetch must be a mapping"),
        ({"manifest": {"parts": []}, "fetch": {"a": {}}}, "must have a token and the length"),
        (
            {
                "manifest": {"parts": [{"sha256": "../a", "num_bytes": 1}]},
                "fetch": {"../a": {"num_bytes": 1, "token": "t"}},
            },
            "must be called by its hash",
        ),
    ],
)
def test_a_hold_message_that_makes_no_sense_is_refused(
    site: Site, record: dict[str, Any], message: str
) -> None:
    site.device.handle("welcome", encode(Payload(record={"welcome": "w"})))
    with pytest.raises(WireError, match=message):
        site.device.handle("hold", encode(Payload(record=record)))


# --- its own data --------------------------------------------------------------------------------


WELCOME = {
    "task": "causal_lm",
    "block_size": 16,
    "max_tokens_per_client": None,
    "max_examples_per_client": None,
}


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model_dir.glob("token*.json")}


def test_a_device_reads_its_data_as_the_run_says(
    corpus_file: Path, tokenizer: dict[str, bytes]
) -> None:
    read = reader(Config(data=DataConfig(source=str(corpus_file))), "ann")
    assert read({**WELCOME, "max_examples_per_client": 3}, tokenizer).num_examples == 3


def test_settings_that_differ_from_the_runs_are_refused(
    corpus_file: Path, tokenizer: dict[str, bytes]
) -> None:
    read = reader(Config(data=DataConfig(source=str(corpus_file), block_size=64)), "ann")
    with pytest.raises(DataError, match="data.block_size must be 16, as in the run, got 64"):
        read(WELCOME, tokenizer)
    assert read({**WELCOME, "block_size": 64}, tokenizer).num_examples > 0


def test_a_device_with_too_little_data_is_told_so(
    tmp_path: Path, tokenizer: dict[str, bytes]
) -> None:
    (tmp_path / "own.jsonl").write_text('{"text": "the"}\n')
    read = reader(Config(data=DataConfig(source=str(tmp_path / "own.jsonl"))), "ann")
    with pytest.raises(DataError, match="ann must have at least one block of 16 tokens"):
        read(WELCOME, tokenizer)


@pytest.mark.parametrize(
    ("changes", "files", "message"),
    [
        ({"task": "mine_bitcoin"}, {}, "not a welcome: .* tasks are causal_lm"),
        ({"block_size": "x"}, {}, "not a welcome"),
        ({}, {"tokenizer.py": b"code"}, "plain names without code"),
        ({}, {"../../.profile": b"code"}, "plain names without code"),
        ({}, {str(number): b"" for number in range(65)}, "plain names without code"),
    ],
    ids="task type code path many".split(),
)
def test_a_welcome_that_makes_no_sense_or_brings_code_is_refused(
    corpus_file: Path, changes: dict[str, Any], files: dict[str, bytes], message: str
) -> None:
    read = reader(Config(data=DataConfig(source=str(corpus_file))), "ann")
    with pytest.raises(WireError, match=message):
        read({**WELCOME, **changes}, files)


# --- its socket ----------------------------------------------------------------------------------


@pytest.fixture
def path(site: Site, tmp_path: Path) -> Path:
    path = tmp_path / "worker.socket"
    arguments = (path, site.device, site.said.append)
    threading.Thread(target=serve_device, args=arguments, daemon=True).start()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            ask(path, "hello", HELLO)
        except OSError:
            time.sleep(0.01)
        else:
            return path
    raise AssertionError("nobody answers")


def test_the_socket_is_for_its_user_alone(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_message_ends_a_device(path: Path, site: Site) -> None:
    rng = np.random.default_rng(0)
    hostile = [
        (4).to_bytes(8, "big") + b"\xff\xfe\xff\xfe" + (0).to_bytes(8, "big"),  # no text
        (2**40).to_bytes(8, "big"),
        (6).to_bytes(8, "big") + b"tra",
        b"",
        *(rng.bytes(int(rng.integers(1, 64))) for _ in range(20)),
    ]
    for content in hostile:
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(path))
            link.sendall(content)
    for kind in ("hello", "welcome", "hold", "train", ""):
        with pytest.raises(WireError):
            ask(path, kind, b"\x00not a message")
    with pytest.raises(ConnectionError):  # too long for a kind: it is cut off
        ask(path, "x" * 1000, b"\x00not a message")
    assert decode(ask(path, "hello", HELLO)).record["client_id"] == "ann"
    assert any("could not answer 'hello'" in text for text in site.said)


def test_a_fault_of_the_device_itself_is_an_answer_too(
    path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(kind: str, content: bytes) -> bytes:
        raise MemoryError("no memory left")

    monkeypatch.setattr(site.device, "handle", no_memory)
    with pytest.raises(WireError, match="MemoryError: no memory left"):
        ask(path, "train", b"")
