"""Moving between rungs: what is sent, what is shared, and what is forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import transformers

from fedpeat.adapter.tunable import attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import EmulatorError
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.emulator.package import EmulatorPackage, pack_emulator
from fedpeat.emulator.parts import short
from fedpeat.federated.participant import Participant, train_message
from fedpeat.federated.shelf import EmulatorShelf, Rung, hashes_of
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import build_from_blocks, frozen
from fedpeat.tuning.local import LocalSettings
from tiny import random_text, tiny_model

LARGE, MEDIUM, SMALL = [0, 1, 2, 3, 5], [0, 1, 3, 5], [0, 3, 5]
LORA = AdapterConfig(placement="all", r=2)


def packed(model: transformers.PreTrainedModel, kept: Sequence[int]) -> EmulatorPackage:
    blocks = find_blocks(model)
    return pack_emulator(
        build_from_blocks(model, blocks, kept),
        model,
        blocks,
        kept,
        recipe="",
        dtype=torch.float32,
        parent_sha256="",
    )


def ladder(config: AdapterConfig = LORA, tuned: Sequence[int] | None = None) -> list[Rung]:
    model = tiny_model("llama")
    rungs = (LARGE, MEDIUM, SMALL)
    return [Rung.of(packed(model, k), config, k if tuned is None else tuned) for k in rungs]


def hold(rung: Rung, rungs: Sequence[Rung], held: Sequence[str] = ()) -> bytes:
    return rung.hold_message(rung.lacking(held), hashes_of(rungs))


def adapter(config: AdapterConfig = LORA, tuned: Sequence[int] = LARGE) -> dict[str, np.ndarray]:
    model = tiny_model("llama")
    return attach(model, find_blocks(model), tuned, config, seed=1).state()


def of_blocks(state: dict[str, np.ndarray], kept: Sequence[int]) -> dict[str, np.ndarray]:
    blocks = find_blocks(tiny_model("llama"))
    return {n: a for n, a in state.items() if blocks.locate(n) in kept}


def trained(one: Participant, rung: Rung, state: dict[str, np.ndarray]) -> dict[str, bytes]:
    settings = LocalSettings(batch_size=2, learning_rate=0.01)
    task = train_message(
        state, server_round=1, emulator=rung.sha256, num_steps=2, first_step=0,
        settings=settings, seed=0,
    )  # fmt: skip
    return {n: a.tobytes() for n, a in decode(one.handle("train", task)).arrays.items()}


def new_shelf() -> EmulatorShelf:
    return EmulatorShelf(torch.device("cpu"), torch.float32)


def device(on: EmulatorShelf | None = None, name: str = "a") -> Participant:
    return Participant(name, random_text(num_blocks=5), on or new_shelf())


def frozen_storages(on: EmulatorShelf, rungs: Sequence[Rung]) -> set[int]:
    return {
        p.untyped_storage().data_ptr()
        for rung in rungs
        for p in on.get(rung.sha256).model.parameters()
        if not p.requires_grad
    }


# --- what is sent ---------------------------------------------------------------------------------


def test_moving_up_a_rung_sends_hardly_more_than_the_bytes_that_differ() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=6,
        num_attention_heads=4,
    )  # fmt: skip
    model = frozen(transformers.LlamaForCausalLM(config), torch.device("cpu"))
    small, large = (Rung.of(packed(model, k), LORA, k) for k in (SMALL, MEDIUM))
    one = device()
    one.handle("hold", hold(small, [small, large]))
    message = hold(large, [small, large], one.parts)
    block = sum(p.numel() * p.element_size() for p in model.model.layers[1].parameters())
    assert block < len(message) <= 1.05 * block
    one.handle("hold", message)
    assert one.held == sorted([small.sha256, large.sha256])


def test_moving_down_a_rung_sends_no_weights() -> None:
    large, medium, small = rungs = ladder()
    one = device()
    one.handle("hold", hold(large, rungs))
    for rung in (medium, small):
        message = hold(rung, rungs, one.parts)
        assert decode(message).arrays == {}
        one.handle("hold", message)
    assert one.held == sorted(rung.sha256 for rung in rungs)


def test_a_device_says_in_few_bytes_what_it_holds() -> None:
    large, *_ = rungs = ladder()
    one = device()
    before = len(one.handle("hello", encode(Payload())))
    one.handle("hold", hold(large, rungs))
    reply = one.handle("hello", encode(Payload()))
    assert decode(reply).record["emulator_parts"] == sorted(map(short, large.parts))
    assert len(reply) - before < 80 + 25 * len(large.parts)


def test_a_part_that_only_a_neighbour_holds_must_be_sent() -> None:
    large, _, small = rungs = ladder()
    on = new_shelf()
    neighbour, one = device(on), device(on, "b")
    neighbour.handle("hold", hold(large, rungs))
    one.handle("hold", hold(small, rungs))
    with pytest.raises(EmulatorError, match="lacks what is not held here: block 1, block 2"):
        one.handle("hold", hold(large, rungs, neighbour.parts))
    assert one.held == [small.sha256]


# --- what is shared -------------------------------------------------------------------------------


def test_three_rungs_have_the_frozen_storages_of_the_largest() -> None:
    large, *smaller = rungs = ladder()
    on = new_shelf()
    for number in range(6):
        device(on, f"d{number}").handle("hold", hold(rungs[number % 3], rungs))
    assert frozen_storages(on, rungs) == frozen_storages(on, [large])
    assert frozen_storages(on, smaller) < frozen_storages(on, [large])


@pytest.mark.parametrize("method", ["lora", "none"])
def test_training_on_one_rung_leaves_no_trace_on_another(method: str) -> None:
    config, tuned = AdapterConfig(method=method, r=2), [0, 5]  # type: ignore[arg-type]
    large, _, small = rungs = ladder(config, tuned)
    state = adapter(config, tuned)
    alone = device()
    alone.handle("hold", hold(small, rungs))
    want = trained(alone, small, state)
    on = new_shelf()
    one, other = device(on), device(on, "b")
    one.handle("hold", hold(large, rungs))
    other.handle("hold", hold(small, rungs))
    trained(one, large, state)
    assert trained(other, small, state) == want
    late = device(on, "c")
    late.handle("hold", hold(small, rungs))
    assert trained(late, small, state) == want


def test_tuned_blocks_are_not_those_that_another_emulator_keeps_frozen() -> None:
    config = AdapterConfig(method="none")
    model = tiny_model("llama")
    both, last = (Rung.of(packed(model, k), config, t) for k, t in ((LARGE, [0, 5]), (SMALL, [5])))
    state = adapter(config, [0, 5])
    alone, on = device(), new_shelf()
    alone.handle("hold", hold(last, [both, last]))
    want = trained(alone, last, of_blocks(state, [5]))
    one, other = device(on), device(on, "b")
    one.handle("hold", hold(both, [both, last]))
    trained(one, both, state)
    other.handle("hold", hold(last, [both, last]))
    assert trained(other, last, of_blocks(state, [5])) == want


def test_with_every_kept_block_tuned_a_rung_has_the_tensors_of_its_blocks() -> None:
    large, _, small = rungs = ladder()
    state = adapter()
    one = device()
    for rung, kept in ((small, SMALL), (large, LARGE)):
        one.handle("hold", hold(rung, rungs, one.parts))
        own = of_blocks(state, kept)
        assert trained(one, rung, own).keys() == own.keys()


# --- what is forgotten ----------------------------------------------------------------------------


def test_parts_that_no_rung_has_any_more_are_forgotten_by_device_and_shelf() -> None:
    large, medium, small = ladder()
    on = new_shelf()
    one = device(on)
    one.handle("hold", hold(large, [large, small]))
    one.handle("hold", hold(medium, [medium, small], one.parts))
    assert one.held == [medium.sha256]
    assert one.parts == sorted(map(short, medium.parts))
    with pytest.raises(EmulatorError, match="no emulator"):
        on.get(large.sha256)
    one.handle("hold", hold(small, [medium, small], one.parts))
    assert len(on.get(small.sha256).parameters) > 0
