"""A sample of the architectures that can be cut, tuned and plugged back, over all families."""

from __future__ import annotations

import pytest

import zoo
from coverage_table import check
from fedpeat.core.errors import FedPEATError
from fedpeat.model.blocks import find_blocks
from fedpeat.model.cut import only_blocks, reasons_to_keep

SAMPLE = [
    ("causal_lm", "gemma3n_text"),
    ("causal_lm", "gemma4"),
    ("causal_lm", "jamba"),
    ("causal_lm", "mixtral"),
    ("causal_lm", "deepseek_v3"),
    ("causal_lm", "mamba2"),
    ("causal_lm", "mllama"),
    ("causal_lm", "phi4_multimodal"),
    ("causal_lm", "reformer"),
    ("causal_lm", "xlm"),
    ("causal_lm", "zamba2"),
    ("masked_lm", "bert"),
    ("masked_lm", "ibert"),
    ("sequence_classification", "deberta-v2"),
    ("sequence_classification", "funnel"),
    ("seq2seq_lm", "t5"),
    ("seq2seq_lm", "bart"),
    ("image_classification", "vit"),
    ("image_classification", "swin"),
    ("image_classification", "convnext"),
    ("image_classification", "cvt"),
    ("image_classification", "mobilenet_v2"),
    ("image_classification", "resnet"),
]
REFUSED = [
    ("masked_lm", "albert", "runs the one block in albert.encoder.albert_layer_groups 6 times"),
    ("image_classification", "textnet", "there are no blocks to compress: layer_drop:0.5 leaves"),
]
NEEDED = {
    "bamba": {},  # two of six with attention
    "deepseek_v3": {},  # two dense before four with experts
    "gemma3_text": {5: "is alone of its kind"},  # full attention among sliding windows
    "gemma3n_text": {
        3: "keeps keys and values for others",
        4: "keeps keys and values for others",
        5: "is alone of its kind",
    },
    "jamba": {1: "is alone of its kind", 4: "is alone of its kind"},  # attention, with and without
    "llama4_text": {3: "is alone of its kind"},  # full attention among chunks
    "mixtral": {},
    "nemotron_h": {3: "is alone of its kind", 4: "is alone of its kind"},
    "qwen3_next": {3: "is alone of its kind"},  # the one with attention
    "zamba2": {2: "shares weights", 5: "shares weights"},
}


@pytest.mark.parametrize(("family", "model_type"), SAMPLE)
@pytest.mark.filterwarnings("ignore")
def test_network_is_cut_tuned_and_plugged_back(family: str, model_type: str) -> None:
    assert " kept" in check(model_type, family)


@pytest.mark.parametrize(("family", "model_type", "reason"), REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_network_that_cannot_be_cut_is_refused_with_the_reason(
    family: str, model_type: str, reason: str
) -> None:
    with pytest.raises(FedPEATError, match=reason):
        check(model_type, family)


@pytest.mark.parametrize("model_type", NEEDED)
def test_hybrid_stack_keeps_what_nothing_else_can_do(model_type: str) -> None:
    model = zoo.build(model_type, "causal_lm")
    blocks = find_blocks(model)
    assert reasons_to_keep(model, blocks, zoo.tiny_batch(model)) == NEEDED[model_type]


def test_blocks_that_read_shared_keys_and_values_may_go_but_not_those_that_keep_them() -> None:
    model = zoo.build("gemma3n_text", "causal_lm")
    batch = {**zoo.tiny_batch(model), "use_cache": False}
    with only_blocks(model, find_blocks(model), [3, 4, 5]):
        assert model(**batch).logits.isfinite().all()
    with (
        only_blocks(model, find_blocks(model), [0, 4, 5]),  # 5 reads what 3 keeps
        pytest.raises(KeyError),
    ):
        model(**batch)
