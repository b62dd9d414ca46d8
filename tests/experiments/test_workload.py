"""What a federation costs, measured on tiny models and compared with what runs and hands count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedpeat.config.loading import config_from_dict, override
from fedpeat.config.schema import Config
from fedpeat.core.errors import WorldError
from fedpeat.core.records import ParticipantResult
from fedpeat.core.run_folder import RunFolder
from fedpeat.experiments.bench import Bench, make_federation, set_up
from fedpeat.experiments.observer import Silent
from fedpeat.experiments.realign import realigned
from fedpeat.experiments.steering import make_controller
from fedpeat.experiments.workload import measure_workload
from fedpeat.federated.participant import Participant
from fedpeat.federated.rounds import FederationState
from fedpeat.federated.shelf import EmulatorShelf
from outcomes import config_of
from tiny import BLOCK_SIZE, VOCAB_SIZE, tiny_image_settings

LADDER: dict[str, Any] = {
    "emulator": {
        "recipe": "layer_drop:0.75", "lower_rungs": [0.5, 0.25], "distill_batch_size": 4,
    },
    "federated": {"client_rungs": [0.75, 0.5, 0.25]},
    "server": {"realign_tokens": 256, "realign_rank": 2},
}  # fmt: skip
FULL: dict[str, Any] = {
    "emulator": {"recipe": "full", "lower_rungs": []},
    "federated": {"client_rungs": []},
}
WIDE: dict[str, Any] = {"adapter": {"placement": "all", "r": 16, "lora_dropout": 0.1}}

# The tiny LLaMA: hidden size 32, 4 heads of 8 (2 for keys and values), 64 neurons, batches of 4.
TOKENS = 4 * BLOCK_SIZE
SIDES = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32),
         "gate": (32, 64), "up": (32, 64), "down": (64, 32)}  # fmt: skip
MATRICES = sum(a * b for a, b in SIDES.values())
ATTENTION = 2 * 2 * TOKENS * BLOCK_SIZE * 32  # two products of (4 heads, 16, 8) with (4, 8, 16)


@pytest.fixture(scope="module")
def config(model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config_of(model_dir, corpus_file, tmp_path_factory.mktemp("runs"), LADDER)


@pytest.fixture(scope="module")
def ladder(config: Config) -> Bench:
    """Return a bench with LoRA at the ends, that tests leave as it is."""
    return bench_of(config)


@pytest.fixture(scope="module")
def wide(config: Config) -> Bench:
    """Return a bench with LoRA on every block, whose adapters tests may train."""
    return bench_of(override(config, WIDE))


@pytest.fixture(scope="module")
def full(config: Config) -> Bench:
    """Return a bench whose devices have the model itself."""
    return bench_of(override(config, FULL))


@pytest.fixture(scope="module")
def images(vit_dir: Path, images_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Return a bench for classes of images."""
    settings = tiny_image_settings(vit_dir, images_dir, tmp_path_factory.mktemp("runs"))
    changes = {"server": {"realign_tokens": 16}, "emulator": {"distill_batch_size": 4}}
    return bench_of(override(config_from_dict(settings), changes))


def bench_of(config: Config) -> Bench:
    folder = RunFolder(Path(mkdtemp(dir=config.output_dir)))  # else an emulator is found there
    return set_up(config, folder, Silent(), None, pools_data=False)


def changed(bench: Bench, changes: dict[str, Any]) -> Bench:
    """Return a bench with other settings for what comes after it was set up."""
    return replace(bench, config=override(bench.config, changes))


class Counting(Participant):
    """A device that counts the bytes of its messages other than "train", both ways."""

    rest_down = rest_up = 0

    def handle(self, kind: str, content: bytes) -> bytes:
        answer = super().handle(kind, content)
        self.rest_down += len(content) if kind == "hello" else 0
        self.rest_up += len(answer) if kind != "train" else 0
        return answer


def recorded(bench: Bench, num_rounds: int) -> list[dict[str, tuple[ParticipantResult, int, int]]]:
    """Return what each round recorded of each device, and the bytes of its train messages."""
    devices = {c: Counting(c, data, bench.shelf) for c, data in bench.data.clients.items()}
    bench = replace(bench, participants=dict(devices))
    federation = make_federation(bench, make_controller(bench))
    state, rounds = FederationState(0, bench.server.state()), []
    for _ in range(num_rounds):
        for device in devices.values():
            device.rest_down = device.rest_up = 0
        state, result = federation.run_round(state, None)
        assert {p.status for p in result.participants} == {"accepted"}
        rounds.append({
            p.client_id: (
                p,
                p.bytes_down - p.bytes_emulator - devices[p.client_id].rest_down,
                p.bytes_up - devices[p.client_id].rest_up,
            )
            for p in result.participants
            if p.client_id in devices
        })  # fmt: skip
    return rounds


# --- bytes --------------------------------------------------------------------------------------


def test_bytes_are_those_that_a_round_records(wide: Bench) -> None:
    assert_bytes_recorded(wide)


def test_bytes_of_the_whole_model_are_those_that_a_round_records(full: Bench) -> None:
    assert_bytes_recorded(full)


def test_bytes_of_images_are_those_that_a_round_records(images: Bench) -> None:
    assert_bytes_recorded(images)


@pytest.mark.parametrize("method", ["none", "prompt"])
def test_bytes_of_other_adapters_are_those_that_a_round_records(
    method: str, config: Config
) -> None:
    changes = {"method": method, "num_virtual_tokens": 4}
    assert_bytes_recorded(bench_of(override(config, {"adapter": changes})))


def assert_bytes_recorded(bench: Bench) -> None:
    loads = {load.name: load for load in measure_workload(bench).rungs}
    assert list(loads) == list(bench.packages)
    (first,) = recorded(bench, 1)
    assert {result.rung for result, _, _ in first.values()} == set(loads)
    for client_id, (result, down, up) in first.items():
        load = loads[result.rung]
        header = result.bytes_emulator - sum(load.parts.values())
        assert 0 <= header < 7000  # manifest, configuration and settings
        digits = 16  # seeds, losses and numbers of examples have more or fewer
        assert abs(load.adapter_down_bytes - down) <= (0 if client_id == min(first) else digits)
        assert abs(load.adapter_up_bytes - up) <= digits


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_what_a_rule_freezes_is_not_sent_again(rule: str, wide: Bench) -> None:
    bench = changed(wide, {"federated": {"lora_aggregation": rule}})
    loads = {load.name: load for load in measure_workload(bench).rungs}
    _, *steady = recorded(bench, 3)
    for client_id, (result, _, _) in steady[0].items():
        load = loads[result.rung]
        down, up = (np.mean([line[client_id][way] for line in steady]) for way in (1, 2))
        assert load.adapter_down_bytes == pytest.approx(down, abs=16)
        assert load.adapter_up_bytes == pytest.approx(up, abs=16)


def test_parts_are_the_packages_parts(ladder: Bench) -> None:
    for load, package in zip(measure_workload(ladder).rungs, ladder.packages.values(), strict=True):
        assert load.parts == {part.sha256: part.num_bytes for part in package.manifest.parts}


# --- operations ---------------------------------------------------------------------------------


def test_a_step_has_the_operations_counted_by_hand(ladder: Bench) -> None:
    r, num_blocks = 2, 3  # LoRA of rank 2 on the first and the last of them
    block = 2 * 2 * TOKENS * MATRICES + 3.5 * ATTENTION  # there, back, and attention's five back
    head = 2 * 2 * TOKENS * 32 * VOCAB_SIZE
    sums = sum(a + b for a, b in SIDES.values())
    lora = 3 * 2 * TOKENS * r * sums  # there, back to its input, and the gradient of both factors
    first = 2 * TOKENS * (sum(a * b for a, b in list(SIDES.values())[:3]) + 3 * r * 32)
    wanted = num_blocks * block + head + 2 * lora - first  # nothing goes back into the embedding
    assert measure_workload(ladder).rungs[-1].step_flops == pytest.approx(wanted, rel=1e-4)


def test_a_middle_block_more_costs_its_matrices_twice_and_its_attention(ladder: Bench) -> None:
    large, medium, small = (load.step_flops for load in measure_workload(ladder).rungs)
    block = 2 * 2 * TOKENS * MATRICES + 3.5 * ATTENTION
    assert large - medium == medium - small == block


def test_the_whole_model_costs_a_device_what_it_costs_the_server(
    full: Bench, ladder: Bench
) -> None:
    whole, cut = measure_workload(full), measure_workload(ladder)
    assert whole.rungs[0].step_flops == whole.server_step_flops
    assert cut.server_step_flops == whole.server_step_flops > cut.rungs[0].step_flops


def test_operations_go_with_the_batch_even_beyond_a_devices_data(
    config: Config, ladder: Bench
) -> None:
    few = {"data": {"max_examples_per_client": 3}, "local": {"local_batch_size": 8}}
    one, two = measure_workload(ladder), measure_workload(bench_of(override(config, few)))
    assert two.server_step_flops == pytest.approx(2 * one.server_step_flops, rel=1e-3)
    for small, large in zip(one.rungs, two.rungs, strict=True):
        assert large.step_flops == pytest.approx(2 * small.step_flops, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "adapter_scale"), [("lora", 3.0), ("ia3", 3.0), ("none", 9.0), ("full", 9.0)]
)
def test_what_grows_with_the_width_alone_has_a_scale_of_its_own(
    method: str, adapter_scale: float, config: Config
) -> None:
    own = {"adapter": {"method": method}, **(FULL if method == "full" else {})}
    bench = bench_of(override(config, own))
    larger = changed(bench, {"world": {"workload_scale": 9.0, "adapter_scale": 3.0}})
    before, after = measure_workload(bench), measure_workload(larger)
    for small, large in zip(before.rungs, after.rungs, strict=True):
        assert large.adapter_down_bytes == adapter_scale * small.adapter_down_bytes
        assert large.adapter_up_bytes == adapter_scale * small.adapter_up_bytes
        assert large.parts == {sha256: 9 * size for sha256, size in small.parts.items()}
        assert large.step_flops == 9 * small.step_flops
        assert large.memory_bytes == 9 * small.memory_bytes


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_a_part_of_the_adapter_takes_fewer_operations_and_less_memory(
    rule: str, wide: Bench
) -> None:
    part = measure_workload(changed(wide, {"federated": {"lora_aggregation": rule}}))
    whole = measure_workload(wide)
    assert part.server_step_flops < whole.server_step_flops
    for large, small in zip(whole.rungs, part.rungs, strict=True):
        assert small.step_flops < large.step_flops
        assert small.memory_bytes < large.memory_bytes


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ladder", "full", "wide"])
def test_memory_is_weights_adapter_and_what_grows_with_the_batch(
    name: str, request: pytest.FixtureRequest
) -> None:
    bench: Bench = request.getfixturevalue(name)
    twice = changed(bench, {"local": {"local_batch_size": 8}})
    rungs = bench.rungs()
    pairs = zip(measure_workload(bench).rungs, measure_workload(twice).rungs, strict=True)
    for load, larger in pairs:
        frozen = 4 * bench.packages[load.name].manifest.num_parameters
        adapter = sum(a.nbytes for a in rungs[load.name].own(bench.server.state()).values())
        fixed = frozen + 4 * adapter  # weights, gradients and two moments
        activations = larger.memory_bytes - load.memory_bytes
        assert load.memory_bytes == pytest.approx(fixed + activations, abs=2048)  # positions
        assert activations > 4 * TOKENS * VOCAB_SIZE


# --- alignment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("name", ["ladder", "wide"])
def test_an_alignment_costs_what_a_real_one_counts_and_sends(
    name: str, rank: int, request: pytest.FixtureRequest
) -> None:
    bench = changed(request.getfixturevalue(name), {"server": {"realign_rank": rank}})
    with sdpa_kernel(SDPBackend.MATH):  # of which PyTorch's counter misses nothing
        profile = measure_workload(bench)
        with FlopCounterMode(display=False) as counter:
            real = realigned(bench, bench.server.state(), 3)
    assert profile.realign_flops == counter.get_total_flops()
    assert profile.refresh_bytes == {
        name: sum(len(p) for s, p in package.parts.items() if s not in bench.packages[name].parts)
        for name, package in real.items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"server": {"realign_tokens": 4 * BLOCK_SIZE - 1}},
        {"emulator": {"recipe": "layer_drop:0.75+int8"}, "server": {"realign_rank": 0}},
    ],
    ids=["no batch", "whole numbers"],
)
def test_settings_that_rule_alignment_out_make_it_cost_nothing(
    changes: dict[str, Any], ladder: Bench
) -> None:
    assert_nothing_to_align(changed(ladder, changes))


def test_where_nothing_can_be_aligned_alignment_costs_nothing(
    config: Config, ladder: Bench, full: Bench
) -> None:
    assert_nothing_to_align(full)
    assert_nothing_to_align(replace(ladder, data=replace(ladder.data, server=None)))
    no_middle = {"adapter": {"num_bottom": 5}}
    few_bits = {**FULL, "emulator": {"recipe": "int8", "lower_rungs": []}}
    assert_nothing_to_align(bench_of(override(config, {**few_bits, **no_middle})))


def assert_nothing_to_align(bench: Bench) -> None:
    profile = measure_workload(bench)
    assert profile.realign_flops == 0
    assert not profile.refresh_bytes
    assert profile.server_step_flops > 0


# --- what it does to the bench, and with its numbers --------------------------------------------


def snapshot(bench: Bench) -> dict[str, Any]:
    """Return all of a bench that training changes, and the random states."""
    tunables = {sha256: bench.shelf.get(sha256) for sha256 in bench.shelf.held}
    models: Mapping[str, nn.Module] = {
        "server": bench.server.model,
        **{sha256: tunable.model for sha256, tunable in tunables.items()},
    }
    facts: dict[str, Any] = {
        "packages": dict(bench.packages),
        "participants": {c: p.inventory() for c, p in bench.participants.items()},
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),  # noqa: NPY002 - the global one, not to be touched
    }
    for owner, model in models.items():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            value = tensor.detach().numpy().tobytes()
            facts[f"{owner} {name}"] = value, tensor.requires_grad, tensor.grad, id(tensor)
        for name, module in model.named_modules():
            facts[f"{owner} {name} mode"] = module.training
    return facts


@pytest.mark.parametrize(("rule", "rank"), [("average", 2), ("rolora", 0)])
def test_the_bench_is_left_as_it_was(rule: str, rank: int, wide: Bench) -> None:
    changes = {"federated": {"lora_aggregation": rule}, "server": {"realign_rank": rank}}
    assert_left_alone(changed(wide, changes))


def test_a_bench_of_images_is_left_as_it_was(images: Bench) -> None:
    assert_left_alone(images)


def assert_left_alone(bench: Bench) -> None:
    recorded(bench, 1)  # so that adapters are no longer fresh
    for module in list(bench.server.model.modules())[::2]:
        module.training = True
    before = snapshot(bench)
    profile = measure_workload(bench)
    assert snapshot(bench) == before
    assert measure_workload(bench) == profile


def test_nothing_is_put_on_the_shelf_of_the_devices(ladder: Bench) -> None:
    fresh = replace(ladder, shelf=EmulatorShelf(ladder.server.device, ladder.dtype))
    assert measure_workload(fresh) == measure_workload(ladder)
    assert fresh.shelf.held == []


def test_scale_multiplies_bytes_operations_and_memory(ladder: Bench) -> None:
    one, many = (
        measure_workload(b) for b in (ladder, changed(ladder, {"world": {"workload_scale": 2.5}}))
    )
    for name in ("server_step_flops", "realign_flops"):
        assert getattr(many, name) == 2.5 * getattr(one, name) > 0
    assert many.refresh_bytes == {n: round(2.5 * b) for n, b in (one.refresh_bytes or {}).items()}
    for small, large in zip(one.rungs, many.rungs, strict=True):
        assert large.name == small.name
        assert large.parts == {n: round(2.5 * size) for n, size in small.parts.items()}
        for name in ("adapter_down_bytes", "adapter_up_bytes"):
            assert getattr(large, name) == round(2.5 * getattr(small, name))
            assert isinstance(getattr(large, name), int)
        assert large.step_flops == 2.5 * small.step_flops
        assert large.memory_bytes == 2.5 * small.memory_bytes


def test_without_devices_there_is_no_workload(ladder: Bench) -> None:
    with pytest.raises(WorldError, match="there are none"):
        measure_workload(replace(ladder, packages={}))
