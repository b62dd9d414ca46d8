"""A sample of the architectures that can be cut, tuned and plugged back, over all families."""

from __future__ import annotations

import pytest

from coverage_table import check

SAMPLE = [
    ("causal_lm", "gemma3n_text"),
    ("causal_lm", "jamba"),
    ("causal_lm", "mixtral"),
    ("causal_lm", "deepseek_v3"),
    ("causal_lm", "mamba2"),
    ("causal_lm", "xlm"),
    ("masked_lm", "bert"),
    ("sequence_classification", "deberta-v2"),
    ("seq2seq_lm", "t5"),
    ("seq2seq_lm", "bart"),
    ("image_classification", "vit"),
    ("image_classification", "swin"),
    ("image_classification", "convnext"),
]


@pytest.mark.parametrize(("family", "model_type"), SAMPLE)
@pytest.mark.filterwarnings("ignore")
def test_network_is_cut_tuned_and_plugged_back(family: str, model_type: str) -> None:
    assert " kept" in check(model_type, family)
