"""The bench of a run: model, data, emulator, participants and federation, from its settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fedpeat.adapter.lora import Part, State, check_only_pairs, part_of
from fedpeat.adapter.placement import tuned_blocks
from fedpeat.adapter.slices import Slice, slices_of
from fedpeat.adapter.tunable import Tunable, attach
from fedpeat.config.schema import Config
from fedpeat.core.errors import DataError
from fedpeat.core.noise import NoiseSource
from fedpeat.core.records import Controller, Transport
from fedpeat.core.run_folder import RunFolder
from fedpeat.core.seeds import derive_seed
from fedpeat.core.wire import Payload
from fedpeat.data.examples import Examples, FederatedData
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.experiments.emulators import make_emulators, rung_name
from fedpeat.experiments.fidelity import Probe
from fedpeat.experiments.methods import pooled
from fedpeat.experiments.observer import Observer
from fedpeat.experiments.plugged import load_full_model
from fedpeat.experiments.privacy import noise_of, privacy_of
from fedpeat.experiments.security import (
    check_secure_cohort,
    secure_aggregator,
    simulated_sides,
)
from fedpeat.experiments.takeover import rung_folders, take_over
from fedpeat.experiments.tasks import Task, task_of
from fedpeat.federated.aggregation import LoraAggregation, ServerOptimizer
from fedpeat.federated.codecs import UpdateCodec
from fedpeat.federated.in_process import InProcessTransport, UnreliableTransport
from fedpeat.federated.participant import Participant
from fedpeat.federated.reception import Reception, welcome_message
from fedpeat.federated.robust import Defence
from fedpeat.federated.rounds import Federation, Realign
from fedpeat.federated.screening import Limits
from fedpeat.federated.shelf import EmulatorShelf, Offer, Rung, hashes_of
from fedpeat.model.blocks import Blocks, find_blocks
from fedpeat.model.loading import LoadedModel
from fedpeat.tuning.evaluation import Quality, evaluate
from fedpeat.tuning.local import LocalSettings, train

__all__ = [
    "Bench",
    "Fleet",
    "local_settings",
    "make_federation",
    "set_up",
    "update_codec",
]

_LEAST_COSINE = 0.1
"""What gradients are taken to agree at least, so that no rung is left out altogether."""


@dataclass(frozen=True)
class Fleet:
    """Devices on other machines.

    Attributes:
        transport: How they are reached.
        offer: Puts parts of emulators where they can fetch them.
        client_ids: Names of those that have a key.
        authority: Certificate of who vouches for their keys, PEM.
    """

    transport: Transport
    offer: Offer
    client_ids: tuple[str, ...]
    authority: bytes = b""


@dataclass(frozen=True)
class Bench:
    """All that one federation works with.

    Attributes:
        config: Settings, as the method changed them.
        data: Who owns which text or images.
        blocks: The full model's block list.
        loaded: The full model; the server's adapter is attached to it.
        tuned: Blocks of the full model that the adapter sits on.
        server: The full model with the adapter.
        shelf: Emulators in memory, shared by all simulated devices.
        packages: The emulators that devices hold by the names of their rungs, the largest first;
            none where there are no devices. They change when they are aligned anew.
        stored_parts: Hashes of the emulators' parts that the run folder has.
        participants: Simulated devices by id; none where devices are on other machines.
        client_ids: Names of all devices.
        zero_shot: Quality of the untouched full model on the test split.
        noise: What noise is drawn from.
        authority: Certificate of who vouches for devices' keys, PEM; empty where nobody asks.
    """

    config: Config
    data: FederatedData[Examples]
    blocks: Blocks
    loaded: LoadedModel
    tuned: list[int]
    server: Tunable
    shelf: EmulatorShelf
    packages: dict[str, EmulatorPackage]
    stored_parts: frozenset[str]
    participants: dict[str, Participant]
    client_ids: tuple[str, ...]
    zero_shot: Quality
    noise: NoiseSource = field(default_factory=NoiseSource.fresh)
    authority: bytes = b""

    @property
    def task(self) -> Task:
        """What the model does."""
        return task_of(self.config)

    @property
    def protected(self) -> list[int]:
        """Blocks that an emulator keeps as they are; none where every kept block is tuned."""
        return [] if self.config.adapter.placement == "all" else self.tuned

    @property
    def package(self) -> EmulatorPackage | None:
        """The emulator of the top rung; None where there are no devices."""
        return next(iter(self.packages.values()), None)

    def rungs(self) -> dict[str, Rung]:
        """Return the emulators as the round loop sees them, by name, put on the shelf."""
        rungs = {}
        trust = self._trust()
        for name, package in self.packages.items():
            kept = set(package.manifest.source_blocks)
            rungs[name] = Rung.of(
                package,
                self.config.adapter,
                [index for index in self.tuned if index in kept],
                self._tensors_of(kept),
                self.slices_of(package),
                trust=trust[name],
            )
        current = hashes_of(rungs.values())
        for rung in rungs.values():
            self.shelf.put(rung.hold_payload(rung.parts, current))
        return rungs

    def _trust(self) -> dict[str, float]:
        """Return what an example counts on each rung.

        Source:
            Brennan (1959), Linear diversity combining techniques: of signals in noise each is
            weighted by how well it is received; here by the share of the energy of a rung's
            gradients that lies along the full model's.
        """
        found = [package.manifest.fidelity for package in self.packages.values()]
        cosines = [f.get("gradient_cosine_tuned", f.get("gradient_cosine")) for f in found]
        if self.config.federated.client_weighting == "examples" or None in cosines:
            return dict.fromkeys(self.packages, 1.0)
        known = [max(cosine or 0.0, _LEAST_COSINE) ** 2 for cosine in cosines]
        return dict(zip(self.packages, known, strict=True))

    def slices_of(self, package: EmulatorPackage) -> dict[str, Slice]:
        """Return the entries of the adapter's tensors that an emulator has in part."""
        return slices_of(self.server.shapes, package.kept)

    def _tensors_of(self, kept: set[int]) -> frozenset[str]:
        """Return the names of the adapter's tensors that a network with some blocks has."""
        places = {name: self.blocks.locate(name) for name in self.server.parameters}
        return frozenset(n for n, index in places.items() if index is None or index in kept)

    @property
    def dtype(self) -> torch.dtype:
        """Type that models compute in."""
        return next(self.loaded.model.parameters()).dtype


def set_up(
    config: Config,
    folder: RunFolder,
    observer: Observer,
    data: FederatedData[Examples] | None,
    *,
    pools_data: bool,
    fleet: Fleet | None = None,
) -> Bench:
    """Load, cut, compress and attach: all that has to be there before the first round.

    Args:
        config: Settings, as the method changed them.
        folder: Where the emulator is kept, or found by a resumed run.
        observer: Is told what goes on.
        data: Data that is there already; read as the settings say if not.
        pools_data: Whether the server gets all data.
        fleet: Devices on other machines; they are simulated, with the clients' data, if None.

    Raises:
        FedPEATError: If model, data and settings do not fit each other.
    """
    noise = noise_of(config, folder)
    observer.message(f"loading model {config.model.name}")
    loaded = load_full_model(config)
    blocks = find_blocks(loaded.model, cut=config.model.cut)
    task = task_of(config)
    if data is None:
        observer.message(f"reading data {config.data.source}")
        data = task.read(config, loaded)
    if pools_data:
        data, config = pooled(data, config)
    client_ids = tuple(data.clients)
    if fleet is not None:
        data, client_ids = replace(data, clients={}), fleet.client_ids
    if config.server.realign_every and data.server is None:
        raise DataError(
            "server.realign_every needs data of the server and there is none; raise "
            "data.server_ratio above 0"
        )
    if data.clients:
        _defence(config).check_cohort(_largest_cohort(config, len(data.clients)))
    if client_ids:
        check_secure_cohort(config, _largest_cohort(config, len(client_ids)))
    zero_shot = evaluate(loaded.model, data.test, config.evaluation.batch_size)
    tuned = tuned_blocks(
        config.adapter.placement,
        blocks.num_blocks,
        config.adapter.num_bottom,
        config.adapter.num_top,
    )
    dtype = next(loaded.model.parameters()).dtype
    shelf = EmulatorShelf(next(loaded.model.parameters()).device, dtype)
    packages: dict[str, EmulatorPackage] = {}
    if client_ids:
        packages = _emulators(config, folder, loaded, blocks, tuned, data, observer)
        if config.adapter.placement == "all":
            tuned = list(next(iter(packages.values())).manifest.source_blocks)
    server = attach(
        loaded.model, blocks, tuned, config.adapter, seed=derive_seed(config.seed, "adapter")
    )
    sides, authority = simulated_sides(config, data.clients)
    participants = {
        c: Participant(c, own, shelf, sides.get(c), noise=noise.child("device", c))
        for c, own in data.clients.items()
    }
    count = sum(d.num_tokens for d in data.clients.values())
    private = f"{count:,}" if participants else "their own"
    observer.message(
        f"{len(client_ids)} devices with {private} private {task.unit}; "
        f"adapter {config.adapter.method} on blocks {tuned}, {server.num_parameters:,} parameters"
    )
    stored = frozenset(sha256 for package in packages.values() for sha256 in package.parts)
    return Bench(
        config,
        data,
        blocks,
        loaded,
        tuned,
        server,
        shelf,
        packages,
        stored,
        participants,
        client_ids,
        zero_shot,
        noise,
        authority if fleet is None else fleet.authority,
    )


def _emulators(
    config: Config,
    folder: RunFolder,
    loaded: LoadedModel,
    blocks: Blocks,
    tuned: list[int],
    data: FederatedData[Examples],
    observer: Observer,
) -> dict[str, EmulatorPackage]:
    """Make the emulators, or take those that this run made before it was interrupted."""
    names = [rung_name(ratio) for ratio in config.emulator.rungs]
    paths = rung_folders(folder.path, names)
    if (paths[names[0]] / "manifest.json").exists():  # it is saved last
        packages = {name: EmulatorPackage.load(path) for name, path in paths.items()}
        if packages[names[0]].manifest.parent_sha256 == loaded.sha256:
            return packages
    if config.emulator.taken_from:
        observer.message(f"taking over the emulators of {config.emulator.taken_from}")
        packages = take_over(config, names, loaded.sha256)
    else:
        packages = make_emulators(
            loaded,
            blocks,
            [] if config.adapter.placement == "all" else tuned,
            config.emulator,
            data,
            task_of(config).metric,
            seed=config.seed,
            observer=observer,
            probe=Probe.of(config),
        )
    for name in reversed(names):
        packages[name].save(paths[name])
    return packages


def _defence(config: Config) -> Defence:
    fed = config.federated
    return Defence(
        fed.robust_rule,
        fed.assumed_attackers_ratio,
        None if fed.secure_aggregation else fed.clip_norm,  # else devices clip themselves
        clip_to_median=fed.clip_to_median,
        max_rejections=fed.max_rejections,
    )


def _largest_cohort(config: Config, num_clients: int) -> int:
    """Return how many devices a round has at most; a controller may always ask all of them."""
    if config.controller.kind != "fixed":
        return num_clients
    return max(1, round(config.federated.fraction_train * num_clients))


def local_settings(config: Config) -> LocalSettings:
    """Return how participants train, before what hides examples."""
    return LocalSettings(
        batch_size=config.local.local_batch_size,
        learning_rate=config.local.local_learning_rate,
        warmup_steps=config.local.warmup_steps,
        weight_decay=config.local.weight_decay,
        max_grad_norm=config.local.max_grad_norm,
        proximal_mu=config.local.proximal_mu,
    )


def client_rungs(bench: Bench) -> dict[str, str]:
    """Return the rung of each device that ``federated.client_rungs`` gives one, by its name."""
    names = [rung_name(ratio) for ratio in bench.config.federated.client_rungs]
    return dict(zip(sorted(bench.client_ids), cycle(names), strict=False))


def make_federation(
    bench: Bench,
    controller: Controller,
    realign: Realign | None = None,
    fleet: Fleet | None = None,
    transport: Transport | None = None,
) -> Federation:
    """Return the federation of a bench; without a transport its devices are in this process."""
    config = bench.config
    fed = config.federated
    if fleet is not None:
        transport = fleet.transport
    if transport is None:
        transport = InProcessTransport({c: p.handle for c, p in bench.participants.items()})
    if fed.dropout_ratio:
        transport = UnreliableTransport(transport, fed.dropout_ratio, config.seed)
    settings = local_settings(config)

    def server_training(
        adapter: State, tuned: Part, num_steps: int, first_step: int, seed: int
    ) -> Payload:
        assert bench.data.server is not None
        bench.server.load(adapter)
        with bench.server.only(part_of(adapter, tuned)) as part:
            stats = train(
                part,
                bench.data.server,
                settings,
                num_steps=num_steps,
                first_step=first_step,
                seed=seed,
            )
            update = part.state()
        return Payload(update, {"num_examples": bench.data.server.num_examples, **asdict(stats)})

    return Federation(
        transport=transport,
        controller=controller,
        rungs=bench.rungs(),
        lora=_lora_aggregation(bench),
        optimizer=ServerOptimizer(
            fed.server_optimizer,
            fed.server_learning_rate,
            fed.server_momentum,
            fed.server_beta2,
            fed.server_tau,
        ),
        limits=Limits(fed.max_examples_per_client, fed.max_update_norm),
        defence=_defence(config),
        secure=secure_aggregator(config, bench.authority),
        privacy=privacy_of(config, len(bench.client_ids), bench.noise),
        settings=settings,
        codec=update_codec(config),
        server_training=server_training if bench.data.server is not None else None,
        realign=realign if bench.data.server is not None and bench.packages else None,
        reception=_reception(bench, fleet) if fleet is not None else None,
        server_weight_ratio=config.server.weight_ratio,
        min_clients=fed.min_clients,
        deadline_seconds=fed.round_deadline_seconds,
        quorum_ratio=fed.round_quorum_ratio,
        num_rounds=fed.num_rounds,
        seed=config.seed,
    )


def _reception(bench: Bench, fleet: Fleet) -> Reception:
    """Return how devices are received: with the tokenizer, and how the run reads data."""
    data = bench.config.data
    record = {
        "task": bench.config.model.task,
        "block_size": data.block_size,
        "max_tokens_per_client": data.max_tokens_per_client,
        "max_examples_per_client": data.max_examples_per_client,
        **bench.task.welcome(bench.loaded, bench.data),
    }
    with TemporaryDirectory() as folder:
        bench.loaded.processor.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return Reception(*welcome_message(record, files), fleet.offer)


def update_codec(config: Config) -> UpdateCodec:
    """Return how devices send their updates."""
    fed = config.federated
    return UpdateCodec(
        fed.update_codec, fed.update_kept_ratio, feedback=fed.lora_aggregation != "svd"
    )


def _lora_aggregation(bench: Bench) -> LoraAggregation:
    fed, r = bench.config.federated, bench.config.adapter.r
    if fed.lora_aggregation != "average":
        check_only_pairs(bench.server.state())
    ranks = zip(sorted(bench.client_ids), cycle(fed.client_ranks), strict=False)
    lower = {client_id: rank for client_id, rank in ranks if rank < r}
    return LoraAggregation(fed.lora_aggregation, lower)
