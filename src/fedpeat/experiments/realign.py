"""Align the emulators anew: distil them against the full model, the tuned adapter in both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from fedpeat.adapter.lora import State
from fedpeat.adapter.slices import sliced
from fedpeat.adapter.tunable import Tunable, attach
from fedpeat.core.seeds import derive_seed
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.emulator.parts import Tensors, split, untied_state
from fedpeat.emulator.update import UPDATE, add_update, fresh_update
from fedpeat.experiments.bench import Bench
from fedpeat.experiments.emulators import distill_settings
from fedpeat.experiments.ladder import Ladder
from fedpeat.tuning.distillation import Pair, distill

__all__ = ["realigned"]

Packages = dict[str, EmulatorPackage]


def realigned(bench: Bench, adapter: State, server_round: int) -> Packages:
    """Return the emulators after alignment with the current adapter, which itself stays as it is.

    Args:
        bench: The full model and the emulators.
        adapter: The current adapter.
        server_round: The coming round, from which the batches follow.

    Raises:
        EmulatorError: If there is nothing that could be aligned.

    Source:
        Wu et al. (2024), FedBiOT, arXiv:2406.17706, for alignment between the rounds.
    """
    bench.server.load(adapter)
    seed = derive_seed(bench.config.seed, "realign", server_round)
    if bench.config.server.realign_rank == 0:
        return _with_new_blocks(bench, adapter, seed)
    return {
        name: _with_new_update(bench, name, package, adapter, seed)
        for name, package in bench.packages.items()
    }


def _with_new_update(
    bench: Bench, name: str, package: EmulatorPackage, adapter: State, seed: int
) -> EmulatorPackage:
    """Return one emulator with a low-rank update that goes on from its last one."""
    kept = package.manifest.source_blocks
    network = package.with_parts({UPDATE: {}}).build(bench.server.device, bench.dtype)
    factors = _factors(bench, package, network, seed)
    add_update(network, factors)
    student = _tunable(bench, network, package, adapter)
    ladder = _ladder(bench, {name: kept}, student)
    _distill(bench, ladder, student, list(factors.values()), derive_seed(seed, name))
    full = package.full_names(factors)
    return package.with_parts({UPDATE: {full[n]: factor for n, factor in factors.items()}})


def _factors(
    bench: Bench, package: EmulatorPackage, network: nn.Module, seed: int
) -> dict[str, nn.Parameter]:
    """Return the factors of the last update, or fresh ones, by the layers' names in the network."""
    kept = package.manifest.source_blocks
    factors = package.update()
    if factors:
        own = package.own_names(factors)
        factors = {own[n]: tensor.to(bench.server.device) for n, tensor in factors.items()}
    else:
        places = [place for place, index in enumerate(kept) if index not in bench.protected]
        blocks, rank = bench.blocks.select(kept), bench.config.server.realign_rank
        factors = fresh_update(network, blocks, places, rank, seed)
    return {n: nn.Parameter(t.float(), requires_grad=False) for n, t in factors.items()}


def _with_new_blocks(bench: Bench, adapter: State, seed: int) -> Packages:
    """Return all emulators with other middle blocks, which the rungs still have in common."""
    names = list(bench.packages)
    kept = {name: package.manifest.source_blocks for name, package in bench.packages.items()}
    top = bench.packages[names[0]]
    network = top.build(bench.server.device, bench.dtype)
    state = untied_state(network)  # by the names that the layers have without the adapter
    own = {id(tensor) for tensor in state.values()}
    student = _tunable(bench, network, top, adapter)
    ladder = _ladder(bench, kept, student)
    trainable = [parameter for parameter in ladder.trainable() if id(parameter) in own]
    _distill(bench, ladder, student, trainable, seed)
    full = top.full_names(state)
    parts = split({full[name]: tensor for name, tensor in state.items()}, bench.blocks)
    changed = {f"block {index}" for index in kept[names[0]] if index not in bench.protected}
    return {name: _replaced(bench.packages[name], parts, changed) for name in names}


def _replaced(
    package: EmulatorPackage, parts: Mapping[str, Tensors], changed: set[str]
) -> EmulatorPackage:
    own = {part.name for part in package.manifest.parts}
    return package.with_parts({name: parts[name] for name in sorted(own & changed)})


def _tunable(bench: Bench, network: nn.Module, package: EmulatorPackage, adapter: State) -> Tunable:
    """Attach the adapter to an emulator's network, frozen."""
    kept = package.manifest.source_blocks
    tuned = [index for index in bench.tuned if index in kept]
    student = attach(network, bench.blocks, tuned, bench.config.adapter, kept=kept)
    own = {name: adapter[name] for name in student.parameters}
    student.load(sliced(own, bench.slices_of(package)))
    student.model.requires_grad_(False)
    return student


def _ladder(bench: Bench, kept: Mapping[str, tuple[int, ...]], student: Tunable) -> Ladder:
    own = {name: list(indices) for name, indices in kept.items()}
    return Ladder(bench.server.network, student.network, bench.blocks, own, bench.protected)


def _distill(
    bench: Bench, ladder: Ladder, student: Tunable, trainable: list[nn.Parameter], seed: int
) -> None:
    data, config = bench.data.server, bench.config
    assert data is not None, "checked when the bench is set up"
    settings = distill_settings(config.emulator, config.server.realign_tokens)

    @contextmanager
    def with_adapters(rung: Callable[[], AbstractContextManager[Pair]]) -> Iterator[Pair]:
        with rung() as pair:
            yield replace(pair, teacher=bench.server.model, student=student.model)

    rungs = [partial(with_adapters, rung) for rung in ladder.rungs]
    with torch.random.fork_rng(devices=[]):
        distill(rungs, trainable, data, settings, seed=seed)
