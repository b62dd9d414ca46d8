"""Measure on the real model what a federation asks of devices: bytes, operations, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from fedpeat.adapter.lora import Part, part_of
from fedpeat.core.errors import ConfigError, EmulatorError, WorldError
from fedpeat.core.seeds import derive_seed
from fedpeat.data.examples import Examples
from fedpeat.emulator.update import UPDATE
from fedpeat.experiments.bench import Bench, update_codec
from fedpeat.experiments.fidelity import Probe
from fedpeat.experiments.realign import realigned
from fedpeat.federated.aggregation import TUNED_PARTS
from fedpeat.federated.participant import Participant, train_message
from fedpeat.federated.shelf import EmulatorShelf, Rung
from fedpeat.mec.workload import RungLoad, WorkloadProfile
from fedpeat.tuning.fidelity import adapter_gradient

__all__ = ["measure_workload"]


_GROWS_WITH_WIDTH = ("lora", "ia3", "prompt")  # and not with the square of it, as weights do


def measure_workload(bench: Bench) -> WorkloadProfile:
    """Return what each rung costs a device, and what the server's own work costs.

    A device makes one local step on each rung, built anew for this, and the server one alignment of
    a single batch; the bench is left as it was. Operations are those of products of matrices, of
    convolutions and of attention, a multiplication and an addition being two; what is done entry by
    entry (norms, AdamW, weights unpacked from few bits) is not counted.

    Where ``federated.lora_aggregation`` freezes a part of the adapter, bytes are those of a device
    that has kept the frozen part from an earlier round, and bytes and operations are the mean over
    the parts that rounds tune in turn. A device of ``federated.client_ranks`` needs less than is
    said here.

    All is multiplied by ``world.workload_scale``, but for messages with an adapter, for which there
    is ``world.adapter_scale``.

    Args:
        bench: The bench of a run that has devices.

    Raises:
        WorldError: If there are no devices.
    """
    if not bench.packages:
        raise WorldError("a workload is measured on the emulators of devices, and there are none")
    device = bench.server.device
    own = replace(bench, shelf=EmulatorShelf(device, bench.dtype))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        loads = [_load_of(own, name, rung) for name, rung in own.rungs().items()]
        realign_flops, refresh_bytes = _alignment(bench)
        profile = WorkloadProfile(loads, _server_step_flops(bench), realign_flops, refresh_bytes)
    world = bench.config.world
    adapter_scale = world.workload_scale
    if world.adapter_scale is not None and bench.config.adapter.method in _GROWS_WITH_WIDTH:
        adapter_scale = world.adapter_scale
    return _scaled(profile, world.workload_scale, adapter_scale)


@dataclass(frozen=True)
class _Turn:
    """What a round asks of a device in which it tunes one part of the adapter.

    Attributes:
        down_bytes: The message with the adapter [B].
        up_bytes: The message with its update [B].
        step_flops: Operations of a step.
        memory_bytes: Weights, gradients, moments, and what a step keeps for its way back [B].
    """

    down_bytes: int
    up_bytes: int
    step_flops: int
    memory_bytes: int


def _load_of(bench: Bench, name: str, rung: Rung) -> RungLoad:
    turns = [_turn(bench, rung, tuned) for tuned in _tuned_parts(bench)]
    return RungLoad(
        name,
        {sha256: len(content) for sha256, content in rung.parts.items()},
        adapter_down_bytes=round(fmean(turn.down_bytes for turn in turns)),
        adapter_up_bytes=round(fmean(turn.up_bytes for turn in turns)),
        step_flops=fmean(turn.step_flops for turn in turns),
        memory_bytes=float(max(turn.memory_bytes for turn in turns)),
    )


def _turn(bench: Bench, rung: Rung, tuned: Part) -> _Turn:
    """Let a device make one step, as the round loop asks for it, and measure that."""
    local, client_id = bench.config.local, min(bench.client_ids)
    adapter = rung.own(bench.server.state())
    sent = part_of(adapter, tuned)
    participant = Participant(client_id, _data_of_a_device(bench), bench.shelf)
    kept = {name: array for name, array in adapter.items() if name not in sent}
    participant.restore({"held": [rung.sha256], "parts": []}, kept)

    def task(num_steps: int) -> bytes:
        return train_message(
            sent,
            server_round=1,
            emulator=rung.sha256,
            num_steps=num_steps,
            first_step=0,
            settings=replace(
                Probe.of(bench.config).settings,
                warmup_steps=local.warmup_steps,
                proximal_mu=local.proximal_mu,
            ),
            seed=derive_seed(bench.config.seed, "client", client_id),
            tuned=tuned,
            left_out=participant.kept,
            codec=update_codec(bench.config),
        )

    with _counting() as counter, _keeping() as saved:
        update = participant.handle("train", task(1))
    tunable = bench.shelf.get(rung.sha256)
    held = _storages([*tunable.model.parameters(), *tunable.model.buffers()])
    trained = sum(p.nbytes for p in part_of(tunable.parameters, tuned).values())
    return _Turn(
        down_bytes=len(task(local.local_steps)),
        up_bytes=len(update),
        step_flops=counter.get_total_flops(),
        memory_bytes=3 * trained  # the gradient and AdamW's two moments
        + sum(storage.nbytes() for storage in (saved | held).values()),
    )


def _data_of_a_device(bench: Bench) -> Examples:
    """Return a device's data; where real devices keep theirs, the server's, of the same shape."""
    clients = bench.data.clients
    return clients[min(clients)] if clients else bench.data.validation


def _server_step_flops(bench: Bench) -> float:
    """Return the operations of a step on the full model, on a device's batch."""
    batch_size = bench.config.local.local_batch_size
    data = _data_of_a_device(bench).spread(batch_size)
    counts = []
    for tuned in _tuned_parts(bench):
        names = part_of(bench.server.parameters, tuned)
        with bench.server.only(names) as part, _counting() as counter:
            adapter_gradient(part, data, batch_size)
        counts.append(counter.get_total_flops())
    return fmean(counts) * batch_size / data.num_examples


def _alignment(bench: Bench) -> tuple[float, dict[str, int]]:
    """Return the operations of one alignment, and what it sends by rung [B]; 0 if there is none.

    A single batch is aligned, and the emulators that come of it are thrown away.
    """
    config, data = bench.config, bench.data.server
    manifests = [package.manifest for package in bench.packages.values()]
    whole = len(manifests[0].source_blocks) == bench.blocks.num_blocks and not manifests[0].layers
    if data is None or (whole and len(manifests) == 1):
        return 0.0, {}
    batch_tokens = config.emulator.distill_batch_size * data.tokens_per_example
    try:  # what no run would be allowed to align
        config = replace(config, server=replace(config.server, realign_every=1))
        single = replace(config, server=replace(config.server, realign_tokens=batch_tokens))
        with _counting() as counter:
            aligned = realigned(replace(bench, config=single), bench.server.state(), 1)
    except (ConfigError, EmulatorError):
        return 0.0, {}
    num_batches = config.server.realign_tokens // batch_tokens
    middle = {f"block {i}" for i in range(bench.blocks.num_blocks) if i not in bench.protected}
    new = {UPDATE} if config.server.realign_rank else middle
    return float(counter.get_total_flops() * num_batches), {
        name: sum(part.num_bytes for part in package.manifest.parts if part.name in new)
        for name, package in aligned.items()
    }


def _tuned_parts(bench: Bench) -> tuple[Part, ...]:
    return TUNED_PARTS[bench.config.federated.lora_aggregation]


def _counting() -> FlopCounterMode:
    """Return PyTorch's counter of operations, which passes over attention on a CPU by itself."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - there is no public name
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001 - nor here
    return FlopCounterMode(
        display=False,
        custom_mapping={
            attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
            backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
        },
    )


@contextmanager
def _keeping() -> Iterator[dict[int, torch.UntypedStorage]]:
    """Give the memory that is kept for the way back, by its address."""
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved.update(_storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def _storages(tensors: Sequence[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the memory of tensors by its address: what several of them share is there once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage for storage in storages}


def _scaled(profile: WorkloadProfile, scale: float, adapter_scale: float) -> WorkloadProfile:
    rungs = [
        RungLoad(
            rung.name,
            {sha256: round(scale * size) for sha256, size in rung.parts.items()},
            adapter_down_bytes=round(adapter_scale * rung.adapter_down_bytes),
            adapter_up_bytes=round(adapter_scale * rung.adapter_up_bytes),
            step_flops=scale * rung.step_flops,
            memory_bytes=scale * rung.memory_bytes,
        )
        for rung in profile.rungs
    ]
    return WorkloadProfile(
        rungs,
        server_step_flops=scale * profile.server_step_flops,
        realign_flops=scale * profile.realign_flops,
        refresh_bytes={n: round(scale * b) for n, b in (profile.refresh_bytes or {}).items()},
    )
