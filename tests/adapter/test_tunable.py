"""Adapters over every method: plug-in, export and import (invariant 2)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from fedpeat.adapter.lora import part_of, truncated
from fedpeat.adapter.placement import tuned_blocks
from fedpeat.adapter.tunable import Tunable, attach, attached, read_adapter
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import AdapterError, SplitError
from fedpeat.emulator.few_bits import store_in_few_bits
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks
from fedpeat.model.loading import load_model
from tiny import CONFIGS, random_ids, tiny_model

TUNED = [0, 5]
METHODS = {
    "lora": AdapterConfig(r=2),
    "dora": AdapterConfig(r=2, use_dora=True),
    "rslora": AdapterConfig(r=2, use_rslora=True),
    "ia3": AdapterConfig(method="ia3"),
    "prompt": AdapterConfig(method="prompt", num_virtual_tokens=3),
    "none": AdapterConfig(method="none"),
}
PEFT_METHODS = [name for name in METHODS if name != "none"]


def on_full(method: str, kind: str = "llama") -> Tunable:
    model = tiny_model(kind)
    return attach(model, find_blocks(model), TUNED, METHODS[method])


def on_emulator(method: str, kind: str = "llama", kept: tuple[int, ...] = (0, 2, 5)) -> Tunable:
    model = tiny_model(kind)
    small = build_from_blocks(model, find_blocks(model), kept)
    return attach(small, find_blocks(model), TUNED, METHODS[method], kept=kept)


def changed(tunable: Tunable, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        n: (a + rng.normal(0, 0.1, a.shape)).astype(a.dtype) for n, a in tunable.state().items()
    }


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_emulator_and_full_model_name_the_adapter_alike(method: str, kind: str) -> None:
    ours, theirs = on_emulator(method, kind).state(), on_full(method, kind).state()
    assert {n: a.shape for n, a in ours.items()} == {n: a.shape for n, a in theirs.items()}


@pytest.mark.parametrize("method", METHODS)
def test_plugged_in_tensors_are_bit_equal_to_those_given(method: str) -> None:
    full = on_full(method)
    state = changed(on_emulator(method))
    full.load(state)
    for name, array in full.state().items():
        assert array.tobytes() == state[name].tobytes(), name


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_adapter_changes_the_output(method: str) -> None:
    full, ids = on_full(method), random_ids()
    before = full.model(input_ids=ids).logits
    full.load(changed(full))
    assert not torch.allclose(full.model(input_ids=ids).logits, before)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "ia3"])
def test_a_fresh_adapter_changes_nothing(method: str) -> None:
    ids = random_ids()
    torch.testing.assert_close(
        on_full(method).model(input_ids=ids).logits, tiny_model("llama")(input_ids=ids).logits
    )


@pytest.mark.parametrize("method", ["lora", "ia3", "none"])
def test_only_the_tuned_blocks_are_tuned(method: str) -> None:
    names = on_full(method).state()
    assert {name.split(".")[2] for name in names} == {"0", "5"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own call
@pytest.mark.parametrize("method", PEFT_METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_alone_reproduces_the_plug_in_from_the_exported_folder(
    method: str, kind: str, tmp_path: Path
) -> None:
    full, ids = on_full(method, kind), random_ids()
    full.load(changed(on_emulator(method, kind)))
    full.save(tmp_path / "adapter", "owner/model")
    reloaded = peft.PeftModel.from_pretrained(tiny_model(kind), str(tmp_path / "adapter")).eval()
    assert torch.equal(reloaded(input_ids=ids).logits, full.model(input_ids=ids).logits)


@pytest.mark.parametrize("method", METHODS)
def test_exported_adapter_reads_back_bit_equal(method: str, tmp_path: Path) -> None:
    full = on_full(method)
    state = changed(full)
    full.load(state)
    full.save(tmp_path / "adapter", "owner/model")
    back = read_adapter(tmp_path / "adapter")
    assert {n: a.tobytes() for n, a in back.items()} == {n: a.tobytes() for n, a in state.items()}


def test_missing_tensor_raises_and_leaves_the_model_as_it_was() -> None:
    full = on_full("lora")
    before = {n: a.tobytes() for n, a in full.state().items()}
    state = changed(full)
    state.pop(next(iter(state)))
    with pytest.raises(AdapterError, match="adapter lacks 1 of"):
        full.load(state)
    assert {n: a.tobytes() for n, a in full.state().items()} == before


def test_unexpected_tensor_raises() -> None:
    full = on_full("lora")
    with pytest.raises(AdapterError, match="adapter has unexpected 1 of .* stranger"):
        full.load({**full.state(), "stranger": np.zeros(1, np.float32)})


def test_tensor_of_another_shape_raises() -> None:
    full = on_full("lora")
    state = full.state()
    name = next(iter(state))
    with pytest.raises(AdapterError, match="must have shape"):
        full.load({**state, name: state[name][:1]})


# --- a part, a lower rank -------------------------------------------------------------------------


def loss_of(tunable: Tunable) -> torch.Tensor:
    loss: torch.Tensor = tunable.model(input_ids=random_ids()).logits.square().mean()
    return loss


def test_outside_a_part_nothing_gets_a_gradient_and_afterwards_all_is_tuned_again() -> None:
    full = on_full("lora")
    full.load(changed(full))
    with full.only(part_of(full.parameters, "lora_B")) as part:
        loss_of(part).backward()
        with_gradient = {n for n, p in full.parameters.items() if p.grad is not None}
        assert with_gradient == part.parameters.keys() == part.state().keys()
        assert all(name.endswith(".lora_B.weight") for name in with_gradient)
    assert all(p.requires_grad for p in full.parameters.values())


def test_a_part_is_tuned_again_as_a_whole_even_after_an_error() -> None:
    full = on_full("lora")
    with pytest.raises(MemoryError), full.only(part_of(full.parameters, "lora_A")):
        raise MemoryError
    assert all(p.requires_grad for p in full.parameters.values())


def test_a_part_that_an_adapter_does_not_have_is_refused() -> None:
    full = on_full("ia3")
    wanted = pytest.raises(AdapterError, match="no tensor to tune is one of those wanted")
    with wanted, full.only(["x.lora_A.weight"]):
        pass


@pytest.mark.parametrize(("method", "scale"), [("lora", 16 / 4), ("rslora", 16 / 2)])
def test_a_lower_rank_keeps_the_scale_of_the_full_one(method: str, scale: float) -> None:
    model, config = tiny_model("llama"), replace(METHODS[method], r=4)
    full = attach(model, find_blocks(model), TUNED, config)
    cut = truncated(changed(full), 3)
    full.load(cut, rank=3)
    assert {n: a.shape for n, a in full.state().items()} == {n: a.shape for n, a in cut.items()}
    name = "model.layers.5.mlp.down_proj"
    layer = full.model.get_submodule("base_model.model." + name)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    b, a = (torch.from_numpy(cut[f"{name}.lora_{factor}.weight"]) for factor in "BA")
    original = tiny_model("llama").get_submodule(name)
    torch.testing.assert_close(layer(x), original(x) + scale * x @ a.T @ b.T, rtol=1e-4, atol=1e-4)


def test_a_lower_rank_is_tuned_and_the_full_one_comes_back() -> None:
    full = on_full("lora")
    state = changed(full)
    full.load(state)
    want = full.model(input_ids=random_ids()).logits
    full.load(truncated(state, 1), rank=1)
    loss_of(full).backward()
    gradients = {n: p.grad for n, p in full.parameters.items()}
    assert {n: None if g is None else tuple(g.shape) for n, g in gradients.items()} == {
        n: a.shape for n, a in truncated(state, 1).items()
    }
    full.load(state)
    loss_of(full).backward()
    assert torch.equal(full.model(input_ids=random_ids()).logits, want)


@pytest.mark.parametrize("rank", [None, 2], ids=["none said", "another one said"])
def test_a_rank_that_nobody_said_is_refused(rank: int | None) -> None:
    full = on_full("lora")
    with pytest.raises(AdapterError, match="must have shape"):
        full.load(truncated(full.state(), 1), rank=rank)


def test_truncated_adapter_file_is_refused(tmp_path: Path) -> None:
    on_full("lora").save(tmp_path / "adapter", "owner/model")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(AdapterError, match="cannot read adapter"):
        read_adapter(tmp_path / "adapter")


def test_seed_alone_decides_the_start() -> None:
    torch.manual_seed(1)
    first = on_full("lora").state()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = on_full("lora").state()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(first[n].tobytes() == second[n].tobytes() for n in first)


def test_lora_on_modules_that_do_not_exist_names_those_that_do() -> None:
    model = tiny_model("llama")
    config = AdapterConfig(target_modules=("query_proj",))
    with pytest.raises(
        AdapterError, match="'query_proj', which no tuned block has; allowed: down_proj.*v_proj"
    ):
        attach(model, find_blocks(model), TUNED, config)


def test_target_modules_limit_where_lora_sits() -> None:
    model = tiny_model("llama")
    tunable = attach(model, find_blocks(model), TUNED, AdapterConfig(target_modules=("q_proj",)))
    assert {name.rsplit(".", 3)[1] for name in tunable.state()} == {"q_proj"}


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "none"])
def test_merged_model_gives_the_plug_ins_logits(method: str) -> None:
    full, ids = on_full(method), random_ids()
    full.load(changed(full))
    expected = full.model(input_ids=ids).logits
    torch.testing.assert_close(full.merged()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_an_adapter_comes_off_layers_that_compute_their_weights(method: str) -> None:
    model, ids = tiny_model("llama"), random_ids()
    blocks = find_blocks(model)
    store_in_few_bits(model, "int8")
    before, layers = model(input_ids=ids).logits, [type(m) for m in model.modules()]
    with attached(model, blocks, [1, 2], METHODS[method]) as tunable:
        tunable.load(changed(tunable))
        assert not torch.equal(tunable.model(input_ids=ids).logits, before)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert [type(m) for m in model.modules()] == layers


class Strided(nn.Module):
    """Two convolutions, whose stride is read from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)[:, :, :: block.stride[0]]  # type: ignore[index]
        return x


def test_settings_of_a_tuned_layer_can_still_be_read() -> None:
    network, x = Strided(), torch.randn(1, 2, 4, 4)
    expected = network(x)
    tunable = attach(network, find_blocks(network), [0, 1], METHODS["lora"])
    torch.testing.assert_close(tunable.model(x), expected)


def test_lora_on_blocks_without_linear_layers_is_refused_with_what_would_work() -> None:
    network = nn.Sequential()
    network.blocks = nn.ModuleList(nn.LayerNorm(2) for _ in range(2))
    message = "tuned blocks of Sequential have only LayerNorm; adapter.method none tunes whole"
    with pytest.raises(AdapterError, match=message):
        attach(network, find_blocks(network), [0, 1], METHODS["lora"])


def test_a_prompt_cannot_be_merged() -> None:
    with pytest.raises(AdapterError, match="a prompt cannot be merged"):
        on_full("prompt").merged()


def test_untuned_gives_the_original_model(model_dir: Path) -> None:
    loaded, ids = load_model(str(model_dir), device="cpu"), random_ids()
    expected = loaded.model(input_ids=ids).logits
    tunable = attach(loaded.model, find_blocks(loaded.model), TUNED, METHODS["lora"])
    tunable.load(changed(tunable))
    with tunable.untuned():
        assert torch.equal(tunable.model(input_ids=ids).logits, expected)


def test_every_block_of_placement_all_gets_its_own_adapter_by_original_index() -> None:
    kept = (0, 2, 5)
    model = tiny_model("llama")
    small = build_from_blocks(model, find_blocks(model), kept)
    tunable = attach(small, find_blocks(model), kept, METHODS["lora"], kept=kept)
    assert {name.split(".")[2] for name in tunable.state()} == {"0", "2", "5"}


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("ends", [0, 1, 9, 10, 11]), ("top", [9, 10, 11]), ("all", list(range(12)))],
)
def test_placement_names_the_tuned_blocks(placement: str, expected: list[int]) -> None:
    assert tuned_blocks(placement, 12, num_bottom=2, num_top=3) == expected


def test_more_tuned_blocks_than_the_model_has_is_refused() -> None:
    with pytest.raises(SplitError, match="wants 8 tuned blocks, the model has 6"):
        tuned_blocks("ends", 6, num_bottom=4, num_top=4)


def test_peft_file_with_a_tensor_too_many_is_refused_on_import(tmp_path: Path) -> None:
    full = on_full("lora")
    full.save(tmp_path / "adapter", "owner/model")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.extra": np.zeros(1, np.float32)}, path)
    with pytest.raises(AdapterError, match="unexpected"):
        full.load(read_adapter(tmp_path / "adapter"))
