"""Who plans the rounds of a run: a fixed plan, or one of many controllers in a simulated world."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedpeat.config.schema import Config, ControllerKind
from fedpeat.control.descent import CoordinateDescent
from fedpeat.control.fixed import FixedController
from fedpeat.control.planners import FixedPlan, FixedPlanner, Planner, RandomPlanner
from fedpeat.control.policy import load_policy
from fedpeat.control.process import FederationProcess, ProcessSettings
from fedpeat.control.sabppo import PolicyPlanner
from fedpeat.control.steering import SteeringController
from fedpeat.control.trained import POLICY_FOLDER, Trained, load_trained
from fedpeat.core.errors import CheckpointError, ConfigError
from fedpeat.core.records import Controller
from fedpeat.core.seeds import derive_seed
from fedpeat.experiments.bench import Bench, client_rungs
from fedpeat.experiments.privacy import is_poisson
from fedpeat.experiments.workload import measure_workload
from fedpeat.mec.quality import QualityModel
from fedpeat.mec.world import WorldSettings

__all__ = ["make_controller", "planner_of", "process_settings", "world_settings"]


def make_controller(bench: Bench) -> Controller:
    """Return who plans the rounds of a run.

    Raises:
        CheckpointError: If a trained controller is missing, damaged, or for another federation.
        WorldError: If the simulated world cannot be.
    """
    config = bench.config
    if config.world.preset is None or not bench.packages:
        return FixedController(
            rung=next(iter(bench.packages), ""),
            client_rungs=client_rungs(bench),
            fraction_train=config.federated.fraction_train,
            local_steps=config.local.local_steps,
            server_steps=_server_steps(bench),
            realign_every=config.server.realign_every,
            seed=bench.noise.seed("cohort") if is_poisson(config) else config.seed,
            is_poisson=is_poisson(config),
        )
    client_ids = sorted(bench.client_ids)
    workload = measure_workload(bench)
    trained = _trained(bench)
    process = FederationProcess(
        world_settings(config, len(client_ids)),
        workload,
        trained.quality,
        trained.settings,
        num_worlds=1,
        seed=derive_seed(config.seed, "world"),
    )
    planner = planner_of(config.controller.kind, config, process, trained)
    return SteeringController(process, planner, client_ids)


def world_settings(config: Config, num_devices: int) -> WorldSettings:
    """Return the simulated world of a run.

    Raises:
        ConfigError: If the run has none.
    """
    world = config.world
    if world.preset is None:
        raise ConfigError("world.preset must be given where a simulated world is needed")
    return WorldSettings(
        preset=world.preset,
        num_devices=num_devices,
        radius_m=world.radius_m,
        down_bandwidth_hz=world.down_bandwidth_hz,
        up_bandwidth_hz=world.up_bandwidth_hz,
        deadline_s=world.deadline_s,
        server_flops_per_s=world.server_flops_per_s,
        server_power_w=world.server_power_w,
    )


def process_settings(
    config: Config,
    *,
    start_loss: float,
    device_examples: tuple[float, float],
    server_examples: float,
) -> ProcessSettings:
    """Return what controllers of a run choose from, and what it is worth.

    Args:
        config: Settings of the run.
        start_loss: Loss of the untuned model on held-out data [nat].
        device_examples: Fewest and most examples of a device.
        server_examples: Examples of the server; with none it never takes part.
    """
    control, takes_part = config.controller, config.server.participates and server_examples > 0
    return ProcessSettings(
        horizon=max(1, config.federated.num_rounds),
        local_steps=control.local_steps,
        server_steps=control.server_steps if takes_part else (0,),
        realigns=control.realigns and server_examples > 0,
        bandwidth=control.bandwidth,
        start_loss=start_loss,
        server_examples=server_examples,
        server_weight_ratio=config.server.weight_ratio,
        device_examples=device_examples,
        weights={
            "seconds": control.time_weight,
            "joules": control.energy_weight,
            "bytes": control.bytes_weight,
        },
    )


def _server_steps(bench: Bench) -> int:
    server = bench.config.server
    if not (server.participates and bench.data.server is not None):
        return 0
    return server.server_steps or bench.config.local.local_steps


def _trained(bench: Bench) -> Trained:
    """Return what a trained controller goes by; the run's own settings for a fixed plan."""
    config, names = bench.config, list(bench.packages)
    if config.controller.kind not in {"fixed", "random"}:
        return load_trained(Path(config.controller.policy), names)
    nothing = np.zeros(1)
    unknown = QualityModel(
        speed=np.zeros((1, len(names))),
        excess=np.zeros((1, len(names))),
        skew=nothing,
        server_speed=nothing,
        steps_power=nothing,
        devices_power=nothing,
        staleness_decay=nothing,
        floor=nothing,
    )
    is_fixed, own = config.controller.kind == "fixed", _server_steps(bench)
    settings = ProcessSettings(
        local_steps=(config.local.local_steps,) if is_fixed else config.controller.local_steps,
        server_steps=(own,) if is_fixed or not own else config.controller.server_steps,
        realigns=config.controller.realigns or config.server.realign_every > 0,
    )
    return Trained(settings, unknown, {})


def planner_of(
    kind: ControllerKind, config: Config, process: FederationProcess, trained: Trained
) -> Planner:
    """Return who chooses, by ``controller.kind``.

    Raises:
        CheckpointError: If there is no tuned plan of that kind, or no policy for this world.
    """
    match kind:
        case "fixed":
            fraction, every = config.federated.fraction_train, config.server.realign_every
            return FixedPlanner(FixedPlan(fraction=fraction, realign_every=every))
        case "random":
            return RandomPlanner()
        case "descent":
            return CoordinateDescent(_tuned("random", config, trained))
        case "sabppo":
            policy = load_policy(Path(config.controller.policy) / POLICY_FOLDER, process)
            return PolicyPlanner(policy)
        case "tuned_fixed":
            return _tuned("random", config, trained)
        case rule:
            return _tuned(rule, config, trained)


def _tuned(rule: str, config: Config, trained: Trained) -> FixedPlanner:
    if rule not in trained.plans:
        raise CheckpointError(
            f"controller {config.controller.policy} must have a plan for {rule}, got "
            f"{', '.join(trained.plans)}"
        )
    return FixedPlanner(trained.plans[rule])
