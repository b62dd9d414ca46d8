"""What a run promises to examples and devices, from its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpeat.config.schema import Config
from fedpeat.core.noise import NoiseSource
from fedpeat.core.run_folder import RunFolder
from fedpeat.federated.accounting import noise_for, require_accountant
from fedpeat.federated.privacy import ClientLevel, ExampleLevel, Privacy

__all__ = ["is_poisson", "noise_of", "privacy_facts", "privacy_of"]


def noise_of(config: Config, folder: RunFolder) -> NoiseSource:
    """Return what a run's noise is drawn from.

    Raises:
        ConfigError: If something is to be hidden, and the accountant is not installed.
    """
    privacy = config.privacy
    if not (privacy.hides_examples or privacy.hides_clients):
        return NoiseSource.fresh()  # nothing is drawn from it
    require_accountant()
    if privacy.noise == "seed":
        return NoiseSource.of_seed(config.seed)
    return NoiseSource(folder.secret())


def is_poisson(config: Config) -> bool:
    """Say whether each device is drawn by itself, which makes a promise to it stronger.

    A controller in a simulated world chooses in other ways.
    """
    return config.privacy.hides_clients and config.world.preset is None


def privacy_of(config: Config, num_clients: int, noise: NoiseSource) -> Privacy:
    """Return what a run promises.

    Args:
        config: Its settings.
        num_clients: Its devices.
        noise: What noise is drawn from.
    """
    privacy, fed = config.privacy, config.federated
    example = client = None
    if privacy.hides_examples:
        example = ExampleLevel(
            batch_size=config.local.local_batch_size,
            clip_norm=privacy.example_clip_norm,
            noise_multiplier=privacy.example_noise_multiplier or None,
            target_epsilon=privacy.example_target_epsilon,
            num_steps=max(1, fed.num_rounds * config.local.local_steps),
            delta=privacy.delta,
        )
    if privacy.hides_clients and num_clients:
        assert fed.clip_norm is not None, "the settings are checked"
        rate = fed.fraction_train if is_poisson(config) else 1.0
        target = privacy.client_target_epsilon
        multiplier = privacy.client_noise_multiplier
        if target is not None:
            multiplier = noise_for(target, rate, max(1, fed.num_rounds), privacy.delta)
        client = ClientLevel(
            clip_norm=fed.clip_norm,
            noise_multiplier=multiplier,
            rate=rate,
            num_clients=num_clients,
            server_ratio=config.server.weight_ratio,
            delta=privacy.delta,
            noise=noise.child("server"),
        )
    return Privacy(example, client)


def privacy_facts(
    config: Config, num_clients: int, history: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return what was promised in the end, as in summary.json; None where nothing was."""
    spent = history[-1]["privacy"]
    promised = privacy_of(config, num_clients, NoiseSource.fresh())
    facts: dict[str, Any] = {"delta": config.privacy.delta, "noise": config.privacy.noise}
    facts |= {"example": None, "client": None}
    if promised.example is not None:
        facts["example"] = {
            "unit": "image" if config.model.task == "image_classification" else "block of text",
            "epsilon": spent.get("example_epsilon", 0.0),
            "noise_multiplier": promised.example.noise_multiplier,
            "target_epsilon": promised.example.target_epsilon,
            "clip_norm": promised.example.clip_norm,
        }
    if promised.client is not None:
        facts["client"] = {
            "epsilon": spent.get("client_epsilon", 0.0),
            "noise_multiplier": promised.client.noise_multiplier,
            "clip_norm": promised.client.clip_norm,
            "sample_rate": promised.client.rate,
            "sampling": "poisson" if promised.client.rate < 1 else "none",
        }
    return facts if promised != Privacy() else None
