"""Emulators as files and messages, with nothing of a dropped block in them (invariants 1, 3, 4)."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from fedpeat.core.errors import EmulatorError
from fedpeat.core.wire import decode, encode
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks
from fedpeat.model.loading import load_model
from tiny import CONFIGS, random_ids, tiny_model, tiny_package

CPU = torch.device("cpu")


def packed(
    kind: str = "llama", kept: tuple[int, ...] = (0, 2, 5), dtype: torch.dtype = torch.float32
) -> EmulatorPackage:
    return tiny_package(kept, kind, recipe="layer_drop:0.5", dtype=dtype)


@pytest.mark.parametrize("kind", CONFIGS)
def test_emulator_of_every_block_has_the_full_models_logits(kind: str) -> None:
    ids = random_ids()
    emulator = packed(kind, kept=tuple(range(6))).build(CPU, torch.float32)
    assert torch.equal(emulator(input_ids=ids).logits, tiny_model(kind)(input_ids=ids).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_value_of_a_dropped_block_is_in_the_bytes(kind: str) -> None:
    model = tiny_model(kind)
    blocks = find_blocks(model)
    message = encode(packed(kind).to_payload())
    for index in range(6):
        matrices = [p for p in blocks.output(model, index).parameters() if p.ndim == 2]
        found = [p.detach().numpy()[0].tobytes() in message for p in matrices]
        assert all(found) if index in (0, 2, 5) else not any(found), index


def test_no_storage_of_a_dropped_block_is_reachable_from_the_built_emulator() -> None:
    model = tiny_model("gpt2")
    blocks = find_blocks(model)
    dropped = {
        p.untyped_storage().data_ptr()
        for i in (1, 3, 4)
        for p in blocks.output(model, i).parameters()
    }
    small = build_from_blocks(model, blocks, (0, 2, 5))
    seen: set[int] = set()
    todo: list[object] = [small]
    storages = set()
    while todo:
        item = todo.pop()
        if (
            id(item) in seen
            or isinstance(item, type)
            or (type(item).__module__ == "builtins" and callable(item))
        ):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages.add(item.untyped_storage().data_ptr())
        if isinstance(item, torch.nn.Module | dict | list | tuple | set | torch.Tensor):
            todo.extend(gc.get_referents(item))
    assert storages == {
        t.untyped_storage().data_ptr() for t in [*small.parameters(), *small.buffers()]
    }
    assert not storages & dropped


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_holder_builds_identical_weights(kind: str) -> None:
    package = packed(kind)
    torch.manual_seed(1)
    first = package.build(CPU, torch.float32)
    torch.manual_seed(2)
    second = EmulatorPackage.from_payload(decode(encode(package.to_payload()))).build(
        CPU, torch.float32
    )
    for (name, ours), theirs in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_bytes_and_parameters_in_the_manifest_are_those_of_the_file() -> None:
    package = packed(dtype=torch.bfloat16)
    tensors = {n: t for part in package.parts.values() for n, t in load(part).items()}
    assert package.manifest.num_bytes == sum(len(part) for part in package.parts.values())
    assert package.manifest.num_parameters == sum(t.numel() for t in tensors.values())
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_folder_round_trip(tmp_path: Path) -> None:
    package = packed()
    package.save(tmp_path / "emulator")
    assert EmulatorPackage.load(tmp_path / "emulator") == package


@pytest.mark.parametrize("part", ["model.safetensors", "config.json", "manifest.json"])
def test_damaged_file_is_refused(tmp_path: Path, part: str) -> None:
    packed().save(tmp_path / "emulator")
    path = tmp_path / "emulator" / part
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(EmulatorError, match="cannot read emulator|is damaged"):
        EmulatorPackage.load(tmp_path / "emulator")


def test_changed_block_indices_are_refused() -> None:
    package = packed()
    with pytest.raises(EmulatorError, match="is damaged: its hash must be"):
        replace(package, manifest=replace(package.manifest, source_blocks=(0, 3, 5))).verify()


def test_weights_of_another_configuration_are_refused() -> None:
    package = packed()
    config = {**package.config, "attention_bias": True}
    with pytest.raises(EmulatorError, match="tensors differ from the configuration's"):
        replace(package, config=config).build(CPU, torch.float32)


def test_configuration_does_not_say_where_the_owner_keeps_the_model(model_dir: Path) -> None:
    model = load_model(str(model_dir), device="cpu").model
    blocks = find_blocks(model)
    small = build_from_blocks(model, blocks, [0, 5])
    package = pack_emulator(
        small,
        model,
        blocks,
        [0, 5],
        recipe="",
        dtype=torch.float32,
        parent_sha256="",
    )
    assert str(model_dir) not in json.dumps(dict(package.config))


# --- what is left of narrower layers ----------------------------------------------------------

KEPT = {
    "model.layers.2.mlp.up_proj.rows": (0, 2, 5),
    "model.layers.2.mlp.down_proj.columns": (0, 2, 5),
    "model.layers.3.mlp.up_proj.rows": (1,),
}


def narrow(kept: dict[str, tuple[int, ...]]) -> EmulatorPackage:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    small = build_from_blocks(model, blocks, (0, 2, 5))
    settings: Any = {"recipe": "", "dtype": torch.float32, "parent_sha256": ""}
    return pack_emulator(small, model, blocks, (0, 2, 5), kept=kept, **settings)


def test_what_is_left_of_its_own_layers_is_saved_and_read(tmp_path: Path) -> None:
    package = narrow(KEPT)
    assert list(package.kept) == list(KEPT)[:2]
    package.save(tmp_path / "e")
    assert EmulatorPackage.load(tmp_path / "e") == package
    assert package.with_parts({}).kept == package.with_fidelity({}).kept == package.kept


def test_what_is_left_is_part_of_what_an_emulator_is() -> None:
    other = {**KEPT, "model.layers.2.mlp.up_proj.rows": (0, 2, 6)}
    one, another = narrow(KEPT), narrow(other)
    assert one.parts == another.parts
    assert one.manifest.sha256 != another.manifest.sha256


def test_which_rows_are_left_is_never_sent() -> None:
    package = narrow(KEPT)
    payload = package.to_payload()
    assert "mlp.up_proj" not in json.dumps(payload.record)
    assert EmulatorPackage.from_payload(payload).kept == {}


@pytest.mark.parametrize("text", ["{}", '{"model.layers.2.mlp.up_proj.rows": [0, 2, 6]}'])
def test_other_rows_than_were_left_are_refused(text: str, tmp_path: Path) -> None:
    narrow(KEPT).save(tmp_path / "e")
    (tmp_path / "e" / "kept.json").write_text(text)
    with pytest.raises(EmulatorError, match="damaged: the hash of kept.json must be"):
        EmulatorPackage.load(tmp_path / "e")


@pytest.mark.parametrize("text", ["[1, 2]", '{"a": 1}', "{"])
def test_rows_that_cannot_be_read_are_refused(text: str, tmp_path: Path) -> None:
    narrow(KEPT).save(tmp_path / "e")
    (tmp_path / "e" / "kept.json").write_text(text)
    with pytest.raises(EmulatorError, match="cannot read emulator"):
        EmulatorPackage.load(tmp_path / "e")
