"""What an audit works with: the emulators of a folder, and the attacker's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedpeat.config.loading import load_config
from fedpeat.config.schema import AuditPlan, Config, DataConfig
from fedpeat.core.errors import ConfigError, DataError, EmulatorError
from fedpeat.data.documents import Document
from fedpeat.data.examples import FederatedData
from fedpeat.data.federation import load_federated_documents, load_federated_text
from fedpeat.data.holdout import hold_out
from fedpeat.data.packing import PackedText, pack
from fedpeat.data.sources import read_corpus
from fedpeat.emulator.package import EmulatorPackage
from fedpeat.experiments.observer import Observer

__all__ = ["SERVER", "AuditText", "Suspect", "audit_text", "find_suspects"]

SERVER = "server"
TEST_RATIO = 0.1


@dataclass(frozen=True)
class Suspect:
    """The emulators of one folder, and the run that they are of.

    Attributes:
        home: Where audit.json goes: the run folder, or that of the emulator where it has no run.
        packages: The emulators by name: "emulator", or the name of a rung.
        config: Settings of the run, or the defaults.
        is_run: Whether there is a run.
    """

    home: Path
    packages: Mapping[str, EmulatorPackage]
    config: Config
    is_run: bool

    def check_model(self, sha256: str) -> None:
        """Check that a full model is the one that the emulators were made of.

        Raises:
            EmulatorError: If it is another one.
        """
        for name, package in self.packages.items():
            wanted = package.manifest.parent_sha256
            if wanted != sha256:
                raise EmulatorError(
                    f"{self.home}: {name} was made of a model with fingerprint {wanted[:12]}, "
                    f"{self.config.model.name} has {sha256[:12]}; name the right one with --model"
                )


@dataclass(frozen=True)
class AuditText:
    """The attacker's text, and text that nobody trains on."""

    public: PackedText
    held_out: PackedText
    held_out_name: str


def find_suspects(path: Path, model: str | None = None) -> Suspect:
    """Return the emulators of a run folder, of its folder ``emulator``, or of one of its rungs.

    Args:
        path: The folder.
        model: The full model's name, if not that of the run's settings.

    Raises:
        EmulatorError: If the folder holds no emulator, or a damaged one.
        ConfigError: If the full model is not known, or is no language model.
    """
    folders = _emulator_folders(path)
    if not folders:
        raise EmulatorError(
            f"{path} must be a run folder with an emulator, or an emulator's folder, got "
            f"{'neither' if path.is_dir() else 'no such folder'}"
        )
    packages = {folder.name: EmulatorPackage.load(folder) for folder in folders}
    above = path.resolve()
    run = next((f for f in (above, *above.parents[:2]) if (f / "config.yaml").exists()), None)
    if run is None and model is None:
        raise ConfigError(f"{path} is of no run; name the full model with --model")
    config = load_config(run / "config.yaml") if run is not None else Config()
    if model is not None:
        config = replace(config, model=replace(config.model, name=model))
    if config.model.task != "causal_lm":
        raise ConfigError(
            f"{path}: only emulators of language models can be audited; model.task must be "
            f"causal_lm, got {config.model.task}"
        )
    home = _as_given(path, run) if run is not None else folders[0]
    return Suspect(home, packages, config, run is not None)


def _as_given(path: Path, run: Path) -> Path:
    """Return the run's folder as the user writes it, if it is the path or above it."""
    return next((f for f in (path, *path.parents) if f.resolve() == run), run)


def _emulator_folders(path: Path) -> list[Path]:
    for folder in (path, path / "emulator"):
        if (folder / "manifest.json").exists():
            return [folder]
        if folder.name == "emulator":
            return sorted(rung.parent for rung in folder.glob("*/manifest.json"))
    return []


def audit_text(suspect: Suspect, plan: AuditPlan, tokenizer: Any, observer: Observer) -> AuditText:
    """Read the attacker's text, and the text to measure on.

    That is the run's test split; documents in it are taken out of the attacker's text. Without a
    run it is held out from the public text.

    Raises:
        DataError: If a source cannot be read, or leaves less than a batch or a block.
    """
    observer.message(f"reading public text {plan.public_text}")
    config = suspect.config
    if not suspect.is_run:
        return _text_without_run(suspect, plan, tokenizer)
    own = load_federated_text(config.data, tokenizer, config.seed)
    if plan.public_text == SERVER:
        public = _server_text(own)
    else:
        tested = {d.text for d in load_federated_documents(config.data, config.seed).test}
        others = [d for d in _public_documents(suspect, plan) if d.text not in tested]
        public = _packed(others, tokenizer, config, plan)
    return AuditText(public, own.test, "test split of the run")


def _text_without_run(suspect: Suspect, plan: AuditPlan, tokenizer: Any) -> AuditText:
    if plan.public_text == SERVER:
        _server_text(None)
    parts = hold_out(
        _public_documents(suspect, plan),
        validation_ratio=0.0,
        test_ratio=TEST_RATIO,
        server_ratio=0.0,
        by_key=False,
        seed=plan.seed,
    )
    public, held_out = (
        _packed(part, tokenizer, suspect.config, plan) for part in (parts.rest, parts.test)
    )
    limit = suspect.config.data.max_eval_blocks
    return AuditText(public, held_out.spread(limit), "held out from the public text")


def _server_text(own: FederatedData[PackedText] | None) -> PackedText:
    if own is None or own.server is None:
        raise DataError(
            "--public-text server needs a run whose server has text (data.server_ratio above 0); "
            "name a file, a folder, stdlib or a Hub dataset"
        )
    return own.server


def _public_documents(suspect: Suspect, plan: AuditPlan) -> list[Document]:
    assert plan.public_text is not None
    source = DataConfig(
        source=plan.public_text,
        subset=plan.public_subset,
        split=plan.public_split,
        text_field=plan.public_field,
        partition="iid",
    )
    corpus = read_corpus(source, suspect.config.seed)
    parts = (corpus.documents, corpus.server, corpus.validation, corpus.test)
    return [document for part in parts if part is not None for document in part]


def _packed(
    documents: Sequence[Document],
    tokenizer: Any,
    config: Config,
    plan: AuditPlan,
) -> PackedText:
    packed = pack(documents, tokenizer, config.data.block_size)
    if packed.num_targets == 0:
        raise DataError(
            f"--public-text {plan.public_text!r} must have at least one block of "
            f"{config.data.block_size} tokens beside the text that is measured on"
        )
    return packed
