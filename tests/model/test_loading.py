"""Loading models strictly, from safetensors only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedpeat.core.errors import ModelError
from fedpeat.model.loading import fingerprint, load_model
from tiny import random_ids, tiny_model


@pytest.fixture
def copied(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_folder_in_hub_form_loads_with_its_weights(model_dir: Path) -> None:
    ids = random_ids()
    loaded = load_model(str(model_dir), device="cpu")
    assert torch.equal(
        loaded.model(input_ids=ids).logits, tiny_model("llama")(input_ids=ids).logits
    )
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_missing_folder_is_named() -> None:
    with pytest.raises(ModelError, match=r"no such model folder: \./nowhere"):
        load_model("./nowhere")


def test_pickled_weights_are_refused(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(weights, copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors only"):
        load_model(str(copied))


def test_truncated_weights_are_refused(copied: Path) -> None:
    content = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(str(copied))


def test_missing_tensor_is_an_error_not_a_random_start(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="missing keys.*layers.3.mlp.up_proj"):
        load_model(str(copied))


def test_unexpected_tensor_is_an_error(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    weights["model.layers.3.extra"] = torch.zeros(1)
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="unexpected keys.*layers.3.extra"):
        load_model(str(copied))


def test_tensor_of_another_shape_is_an_error(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ModelError, match=r"mismatched|size|shape"):
        load_model(str(copied))


def test_unknown_device_is_named() -> None:
    with pytest.raises(ModelError, match=r"model\.device must be .*got 'abacus'"):
        load_model("bundled", device="abacus")


def test_fingerprint_changes_with_one_weight() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    assert fingerprint(model) != before
