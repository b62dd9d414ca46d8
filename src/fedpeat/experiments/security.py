"""Secure aggregation of a run, from its settings; its libraries are imported if it is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from fedpeat.config.schema import Config
from fedpeat.core.errors import ConfigError
from fedpeat.federated.secagg.seam import SecureAggregator, SecureSide

__all__ = ["check_secure_cohort", "own_side", "secure_aggregator", "simulated_sides"]


def check_secure_cohort(config: Config, cohort_size: int) -> None:
    """Check that a full round's devices are enough to hide among.

    Raises:
        ConfigError: If they are not, so that no round could ever count.
    """
    least = config.federated.secure_min_devices
    if config.federated.secure_aggregation and cohort_size < least:
        raise ConfigError(
            f"federated.secure_aggregation needs rounds of at least federated.secure_min_devices = "
            f"{least} devices, got {cohort_size}"
        )


def secure_aggregator(config: Config, authority: bytes) -> SecureAggregator | None:
    """Return the server's side; None where updates come in clear.

    Args:
        config: Settings.
        authority: Certificate of the authority that vouches for devices, PEM.
    """
    fed = config.federated
    if not fed.secure_aggregation:
        return None
    _require_libraries()
    from fedpeat.federated.secagg.identity import Authority  # noqa: PLC0415 - an extra
    from fedpeat.federated.secagg.round import SecureAggregation  # noqa: PLC0415

    return SecureAggregation(
        Authority(authority),
        threshold_ratio=fed.secure_threshold_ratio,
        num_neighbours=fed.secure_neighbours,
        min_devices=fed.secure_min_devices,
        clip_range=fed.secure_clip_range,
        num_bits=fed.secure_bits,
        max_examples=fed.max_examples_per_client,
        clip_norm=fed.clip_norm,
        seed=config.seed,
    )


def simulated_sides(config: Config, names: Iterable[str]) -> tuple[dict[str, SecureSide], bytes]:
    """Return the sides of devices in this process, and the certificate of their authority.

    Both are empty where updates come in clear.
    """
    if not config.federated.secure_aggregation:
        return {}, b""
    _require_libraries()
    from fedpeat.federated.secagg.device import SecureDevice  # noqa: PLC0415 - an extra
    from fedpeat.federated.secagg.identity import simulated  # noqa: PLC0415

    identities, authority = simulated(names)
    least = config.federated.secure_min_devices
    return {name: SecureDevice(own, least) for name, own in identities.items()}, authority


def own_side(
    config: Config, name: str, ca: Path, key: Path, certificate: Path
) -> SecureSide | None:
    """Return the side of a device on a machine of its own; None if it sends updates in clear.

    Args:
        config: Its own settings.
        name: What its key calls it.
        ca: Certificate of the authority.
        key: Its private key.
        certificate: Its certificate.

    Raises:
        ConfigError: If they cannot be read.
    """
    if not config.federated.secure_aggregation:
        return None
    _require_libraries()
    from fedpeat.federated.secagg.device import SecureDevice  # noqa: PLC0415 - an extra
    from fedpeat.federated.secagg.identity import identity_of  # noqa: PLC0415

    identity = identity_of(name, ca, key, certificate)
    return SecureDevice(identity, config.federated.secure_min_devices)


def _require_libraries() -> None:
    missing = [name for name in ("cryptography", "Crypto") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "federated.secure_aggregation needs cryptography and pycryptodome: "
            'pip install "fedpeat[flower]"'
        )
