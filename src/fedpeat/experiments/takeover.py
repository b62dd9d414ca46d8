"""Emulators of another run, taken over where they would be made just the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpeat.config.loading import differences, load_config
from fedpeat.config.schema import Config
from fedpeat.core.errors import ConfigError, EmulatorError
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.experiments.methods import METHODS

__all__ = ["making_differs", "rung_folders", "take_over"]

_MAKING = ("model.", "data.", "emulator.", "adapter.", "local.", "seed")


def rung_folders(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return where a run keeps its emulators, by the names of their rungs, the largest first."""
    top, *lower = names
    return {top: folder / "emulator", **{name: folder / "rungs" / name for name in lower}}


def making_differs(one: Config, other: Config) -> Mapping[str, tuple[Any, Any]]:
    """Return the settings by which two runs would make emulators that differ."""
    made = []
    for config in (one, other):
        changed = METHODS[config.method].settings(config)
        emulator = replace(changed.emulator, taken_from="")
        made.append(replace(changed, emulator=emulator))
    return {n: pair for n, pair in differences(*made).items() if n.startswith(_MAKING)}


def take_over(
    config: Config, names: Sequence[str], model_sha256: str
) -> dict[str, EmulatorPackage]:
    """Return the emulators of the run that ``emulator.taken_from`` names.

    Args:
        config: Settings of the run that takes them over, as its method changed them.
        names: Rungs, the largest first.
        model_sha256: Hash of the full model.

    Raises:
        ConfigError: If there is no such run, or it has other settings.
        EmulatorError: If the emulators are missing or damaged, or of another model.
    """
    folder = Path(config.emulator.taken_from)
    if not (folder / "config.yaml").exists():
        raise ConfigError(
            f"emulator.taken_from must be the folder of a run or calibration, got {folder}"
        )
    if changes := making_differs(load_config(folder / "config.yaml"), config):
        name, (there, here) = next(iter(changes.items()))
        raise ConfigError(
            f"emulator.taken_from must be a run whose emulators are made by the same settings, got "
            f"{folder} with {name} {there} instead of {here}"
        )
    paths = rung_folders(folder, names)
    packages = {name: EmulatorPackage.load(path) for name, path in paths.items()}
    for name, package in packages.items():
        if package.manifest.parent_sha256 != model_sha256:
            raise EmulatorError(
                f"{paths[name]} must be an emulator of model {model_sha256[:12]}, got one of "
                f"{package.manifest.parent_sha256[:12]}"
            )
    return packages
