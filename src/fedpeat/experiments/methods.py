"""What each method is, as a change of settings: all run in the same loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedpeat.config.schema import Config, PrivacyConfig
from fedpeat.data.examples import Examples, FederatedData

__all__ = ["METHODS", "MethodPlan", "pooled"]


@dataclass(frozen=True)
class MethodPlan:
    """How a method uses the loop.

    Attributes:
        settings: What it changes in the settings.
        pools_data: Whether all data is brought to the server, against the owners' wish.
    """

    settings: Callable[[Config], Config]
    pools_data: bool = False


def _as_is(config: Config) -> Config:
    return config


def _plain_average(config: Config) -> Config:
    """Leave out how LoRA is aggregated, where there is no LoRA or nobody to average with."""
    plain = replace(config.federated, lora_aggregation="average", client_ranks=())
    return replace(config, federated=plain)


def _undefended(config: Config) -> Config:
    """Leave out what is for a device among others, where none has others beside it."""
    return replace(
        config,
        federated=replace(
            config.federated,
            robust_rule="mean",
            secure_aggregation=False,
            update_codec="float32",
        ),
        privacy=replace(config.privacy, client_noise_multiplier=0.0, client_target_epsilon=None),
    )


def _pooled(config: Config) -> Config:
    config = replace(config, privacy=PrivacyConfig())  # no device keeps anything to itself
    return _full_model(_undefended(_plain_average(config)))


def _whole_blocks(config: Config) -> Config:
    config = _plain_average(config)
    return replace(config, adapter=replace(config.adapter, method="none"))


def _full_model(config: Config) -> Config:
    config = _one_rung(config)
    return replace(config, emulator=replace(config.emulator, recipe="full"))


def _one_rung(config: Config) -> Config:
    """Leave out the ladder, where all hold the same."""
    return replace(
        config,
        emulator=replace(config.emulator, lower_rungs=()),
        federated=replace(config.federated, client_rungs=()),
        server=replace(config.server, realign_every=0),
    )


def _alone(config: Config) -> Config:
    return _one_rung(_undefended(_plain_average(config)))


def _all_weights(config: Config) -> Config:
    config = _full_model(_plain_average(config))
    return replace(config, adapter=replace(config.adapter, method="full"))


def _no_rounds(config: Config) -> Config:
    return _full_model(replace(config, federated=replace(config.federated, num_rounds=0)))


METHODS: dict[str, MethodPlan] = {
    "fedpeat": MethodPlan(_as_is),
    "fed_eat": MethodPlan(_whole_blocks),
    "fed_peft": MethodPlan(_full_model),
    "fed_ft": MethodPlan(_all_weights),
    "centralized": MethodPlan(_pooled, pools_data=True),
    "local": MethodPlan(_alone),
    "zero_shot": MethodPlan(_no_rounds),
}


def pooled(data: FederatedData[Examples], config: Config) -> tuple[FederatedData[Examples], Config]:
    """Give the server all data, and as many steps as all participants together had in a round."""
    parts = [*data.clients.values(), *([data.server] if data.server is not None else [])]
    cohort_size = max(1, round(config.federated.fraction_train * len(data.clients)))
    steps = cohort_size * config.local.local_steps
    if config.server.participates and data.server is not None:
        steps += config.server.server_steps or config.local.local_steps
    server = replace(config.server, participates=True, server_steps=steps, weight_ratio=None)
    everything = type(parts[0]).concatenate(parts)
    pool = FederatedData[Examples]({}, everything, data.validation, data.test)
    return pool, replace(config, server=server)
