"""Runs over real corpora, where a folder with them is at hand; users do not have it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fedpeat.config.schema import DataConfig
from fedpeat.data import load_federated_text

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("FEDPEAT_SHARED") or REPOSITORY.parent / "shared") / "data"


def require(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {name} in {SHARED}; set FEDPEAT_SHARED to a folder that has data/{name}")
    return path


@pytest.mark.slow
def test_instructions_are_a_federation_of_files(tokenizer: PreTrainedTokenizerFast) -> None:
    folder = require("instruct/dolly-fed10")
    config = DataConfig(
        source=str(folder / "local_training_*.json"),
        test_source=str(folder / "global_test.json"),
        prompt_field="instruction",
        context_field="context",
        text_field="response",
        num_clients=2,
        max_tokens_per_client=12_800,
    )
    text = load_federated_text(config, tokenizer, seed=0)
    assert list(text.clients) == ["local_training_0.json", "local_training_4.json"]
    assert [packed.num_examples for packed in text.clients.values()] == [100, 100]
    assert 0.1 < text.validation.loss_mask.mean() < 0.9


def test_speakers_of_shakespeare_are_owners(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    play = require("shakespeare/tinyshakespeare_input.txt").read_text(encoding="utf-8")
    speeches = [speech.partition(":\n") for speech in play.split("\n\n")]
    lines = [json.dumps({"speaker": who, "speech": said}) for who, _, said in speeches if said]
    path = tmp_path / "speeches.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    config = DataConfig(
        source=str(path), text_field="speech", key_field="speaker", num_clients=4, block_size=64
    )
    text = load_federated_text(config, tokenizer, seed=0)
    assert list(text.clients)[:2] == ["GLOUCESTER", "DUKE VINCENTIO"]
    assert min(packed.num_examples for packed in text.clients.values()) > 100
