"""The bench of a run: model, text, emulator, participants and federation, from its settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import cycle

import torch

from fedpeat.adapter.lora import Part, State, check_only_pairs, part_of
from fedpeat.adapter.placement import tuned_blocks
from fedpeat.adapter.tunable import Tunable, attach
from fedpeat.config.schema import Config
from fedpeat.control.fixed import FixedController
from fedpeat.core.errors import DataError
from fedpeat.core.records import Controller, Transport
from fedpeat.core.run_folder import RunFolder
from fedpeat.core.seeds import derive_seed
from fedpeat.core.wire import Payload, decode
from fedpeat.data.federation import FederatedText, load_federated_text
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.experiments.emulators import make_emulator
from fedpeat.experiments.methods import pooled
from fedpeat.experiments.observer import Observer
from fedpeat.experiments.plugged import load_full_model
from fedpeat.federated.aggregation import LoraAggregation, ServerOptimizer
from fedpeat.federated.in_process import InProcessTransport, UnreliableTransport
from fedpeat.federated.participant import Participant
from fedpeat.federated.rounds import Federation
from fedpeat.federated.screening import Limits
from fedpeat.federated.shelf import EmulatorShelf, Rung, parts_of
from fedpeat.model.blocks import Blocks, find_blocks
from fedpeat.model.loading import LoadedModel
from fedpeat.tuning.evaluation import Quality, evaluate
from fedpeat.tuning.local import LocalSettings, train

__all__ = ["Bench", "make_controller", "make_federation", "set_up"]

EMULATOR_RUNG = "emulator"


@dataclass(frozen=True)
class Bench:
    """All that one federation works with.

    Attributes:
        config: Settings, as the method changed them.
        text: Who owns which text.
        blocks: The full model's block list.
        loaded: The full model; the server's adapter is attached to it.
        server: The full model with the adapter.
        shelf: Emulators in memory, shared by all simulated devices.
        package: The emulator that devices hold; None where there are no devices.
        participants: Simulated devices by id.
        rung: The emulator as the round loop sees it.
        zero_shot: Quality of the untouched full model on the test split.
    """

    config: Config
    text: FederatedText
    blocks: Blocks
    loaded: LoadedModel
    server: Tunable
    shelf: EmulatorShelf
    package: EmulatorPackage | None
    participants: dict[str, Participant]
    rung: Rung | None
    zero_shot: Quality

    @property
    def dtype(self) -> torch.dtype:
        """Type that models compute in."""
        return next(self.loaded.model.parameters()).dtype


def set_up(
    config: Config,
    folder: RunFolder,
    observer: Observer,
    text: FederatedText | None,
    *,
    pools_data: bool,
) -> Bench:
    """Load, cut, compress and attach: all that has to be there before the first round.

    Args:
        config: Settings, as the method changed them.
        folder: Where the emulator is kept, or found by a resumed run.
        observer: Is told what goes on.
        text: Text that is there already; read as the settings say if not.
        pools_data: Whether the server gets all text.

    Raises:
        FedPEATError: If model, data and settings do not fit each other.
    """
    observer.message(f"loading model {config.model.name}")
    loaded = load_full_model(config)
    blocks = find_blocks(loaded.model)
    if text is None:
        observer.message(f"reading data {config.data.source}")
        text = load_federated_text(config.data, loaded.tokenizer, config.seed)
    if pools_data:
        text, config = pooled(text, config)
    _check_block_size(loaded, config)
    zero_shot = evaluate(loaded.model, text.test, config.evaluation.batch_size)
    tuned = tuned_blocks(
        config.adapter.placement,
        blocks.num_blocks,
        config.adapter.num_bottom,
        config.adapter.num_top,
    )
    dtype = next(loaded.model.parameters()).dtype
    shelf = EmulatorShelf(next(loaded.model.parameters()).device, dtype)
    package = None
    if text.clients:
        package = _emulator(config, folder, loaded, blocks, tuned, text, observer)
        if config.adapter.placement == "all":
            tuned = list(package.manifest.source_blocks)
    rung = None
    if package is not None:
        rung = Rung.of(package, config.adapter, tuned)
        shelf.put(decode(rung.hold_message(rung.parts, parts_of([rung]))))
    server = attach(
        loaded.model, blocks, tuned, config.adapter, seed=derive_seed(config.seed, "adapter")
    )
    participants = {c: Participant(c, data, shelf) for c, data in text.clients.items()}
    observer.message(
        f"{len(participants)} devices with {sum(d.num_tokens for d in text.clients.values()):,} "
        f"private tokens; adapter {config.adapter.method} on blocks {tuned}, "
        f"{server.num_parameters:,} parameters"
    )
    return Bench(
        config, text, blocks, loaded, server, shelf, package, participants, rung, zero_shot
    )


def _check_block_size(loaded: LoadedModel, config: Config) -> None:
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    extra = config.adapter.num_virtual_tokens if config.adapter.method == "prompt" else 0
    if isinstance(longest, int) and config.data.block_size + extra > longest:
        raise DataError(
            f"data.block_size{' + adapter.num_virtual_tokens' if extra else ''} must be at most "
            f"{longest}, the model's longest input, got {config.data.block_size + extra}"
        )


def _emulator(
    config: Config,
    folder: RunFolder,
    loaded: LoadedModel,
    blocks: Blocks,
    tuned: list[int],
    text: FederatedText,
    observer: Observer,
) -> EmulatorPackage:
    """Make the emulator, or take the one that this run made before it was interrupted."""
    path = folder.path / "emulator"
    if (path / "manifest.json").exists():
        package = EmulatorPackage.load(path)
        if package.manifest.parent_sha256 == loaded.sha256:
            return package
    protected = [] if config.adapter.placement == "all" else tuned
    package = make_emulator(
        loaded, blocks, protected, config.emulator, text, seed=config.seed, observer=observer
    )
    package.save(path)
    return package


def make_controller(bench: Bench) -> Controller:
    config = bench.config
    participates = config.server.participates and bench.text.server is not None
    return FixedController(
        rung=EMULATOR_RUNG,
        fraction_train=config.federated.fraction_train,
        local_steps=config.local.local_steps,
        server_steps=(config.server.server_steps or config.local.local_steps)
        if participates
        else 0,
        seed=config.seed,
    )


def make_federation(bench: Bench, controller: Controller) -> Federation:
    config = bench.config
    fed = config.federated
    transport: Transport = InProcessTransport({c: p.handle for c, p in bench.participants.items()})
    if fed.dropout_ratio:
        transport = UnreliableTransport(transport, fed.dropout_ratio, config.seed)
    settings = LocalSettings(
        batch_size=config.local.local_batch_size,
        learning_rate=config.local.local_learning_rate,
        warmup_steps=config.local.warmup_steps,
        weight_decay=config.local.weight_decay,
        max_grad_norm=config.local.max_grad_norm,
        proximal_mu=config.local.proximal_mu,
    )

    def server_training(
        adapter: State, tuned: Part, num_steps: int, first_step: int, seed: int
    ) -> Payload:
        assert bench.text.server is not None
        bench.server.load(adapter)
        with bench.server.only(part_of(adapter, tuned)) as part:
            stats = train(
                part,
                bench.text.server,
                settings,
                num_steps=num_steps,
                first_step=first_step,
                seed=seed,
            )
            update = part.state()
        return Payload(update, {"num_examples": bench.text.server.num_examples, **asdict(stats)})

    return Federation(
        transport=transport,
        controller=controller,
        rungs={EMULATOR_RUNG: bench.rung} if bench.rung is not None else {},
        lora=_lora_aggregation(bench),
        optimizer=ServerOptimizer(
            fed.server_optimizer,
            fed.server_learning_rate,
            fed.server_momentum,
            fed.server_beta2,
            fed.server_tau,
        ),
        limits=Limits(fed.max_examples_per_client, fed.max_update_norm),
        settings=settings,
        server_training=server_training if bench.text.server is not None else None,
        server_weight_ratio=config.server.weight_ratio,
        min_clients=fed.min_clients,
        deadline_seconds=fed.round_deadline_seconds,
        num_rounds=fed.num_rounds,
        seed=config.seed,
    )


def _lora_aggregation(bench: Bench) -> LoraAggregation:
    fed, r = bench.config.federated, bench.config.adapter.r
    if fed.lora_aggregation != "average":
        check_only_pairs(bench.server.state())
    ranks = zip(sorted(bench.participants), cycle(fed.client_ranks), strict=False)
    lower = {client_id: rank for client_id, rank in ranks if rank < r}
    return LoraAggregation(fed.lora_aggregation, lower)
