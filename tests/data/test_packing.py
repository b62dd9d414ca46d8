from __future__ import annotations

import logging

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fedpeat.core.errors import DataError
from fedpeat.data.documents import Document
from fedpeat.data.packing import PackedText, bytes_by_offset, pack, tokenize

UNICODE = [
    "plain words",
    "naïve café, größer",
    "€ 日本語 한국어 🙂🏳️‍🌈 x",
    "  leading, double  and trailing spaces \n\n",
    "\u0301combining first, null \x00 and bell \x07",
    "\r\n\ttabs\u2028\ufeff",
]


def word_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words that skips spaces, with one ID for each word."""
    words = ["[UNK]", "red", "green", "blue", "héé", "<e>", "<b>", "<s>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


class SlowWords(PreTrainedTokenizer):
    """Words in pure Python, with one ID for all of them."""

    @property
    def vocab_size(self) -> int:
        return 1

    def get_vocab(self) -> dict[str, int]:
        return {"word": 0}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return 0


ENDING = {"eos_token": "<e>"}


def blocks(num_blocks: int, block_size: int = 2) -> PackedText:
    ids = np.arange(num_blocks * block_size, dtype=np.int32).reshape(num_blocks, block_size)
    return PackedText(ids, np.ones(ids.shape, np.bool_), np.ones(ids.shape, np.int32))


def test_documents_are_joined_with_end_tokens_and_cut_without_the_rest() -> None:
    documents = [Document("red green"), Document("blue"), Document("red red")]
    packed = pack(documents, word_tokenizer(**ENDING), block_size=3)
    assert packed.input_ids.tolist() == [[1, 2, 5], [3, 5, 1]]
    assert packed.loss_mask.all()
    assert (packed.num_examples, packed.num_tokens) == (2, 6)


def test_arrays_are_int32_and_bool() -> None:
    packed = pack([Document("red green")], word_tokenizer(**ENDING), block_size=2)
    kinds = (packed.input_ids.dtype, packed.loss_mask.dtype, packed.token_bytes.dtype)
    assert [str(kind) for kind in kinds] == ["int32", "bool", "int32"]


def test_prompt_tokens_are_shown_with_their_bytes_but_are_no_targets() -> None:
    document = Document("blue", prompt="red green\n")
    stream = tokenize([document, document], word_tokenizer(**ENDING))
    assert stream.input_ids.tolist() == [1, 2, 3, 5] * 2
    assert stream.loss_mask.tolist() == [False, False, True, True] * 2
    assert stream.token_bytes.tolist() == [3, 7, 4, 0] * 2


@pytest.mark.parametrize(
    ("special_tokens", "separator"),
    [
        ({"eos_token": "<e>", "bos_token": "<b>", "sep_token": "<s>"}, [5]),
        ({"bos_token": "<b>", "sep_token": "<s>"}, [6]),
        ({"sep_token": "<s>"}, [7]),
        ({}, []),
    ],
)
def test_separator_is_eos_or_else_bos_or_sep_or_nothing(
    special_tokens: dict[str, str], separator: list[int]
) -> None:
    stream = tokenize([Document("red")], word_tokenizer(**special_tokens))
    assert stream.input_ids.tolist() == [1, *separator]


def test_a_separator_whose_id_is_0_is_used(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token_id == 0
    assert tokenize([Document("the")], tokenizer).input_ids[-1] == 0


def test_skipped_spaces_count_for_the_next_token_and_at_the_end_for_the_last() -> None:
    stream = tokenize([Document(" red  héé \n")], word_tokenizer(**ENDING))
    # " red" is 4 bytes; "  héé" is 2 + 1 + 2 + 2, and " \n" 2 more.
    assert stream.token_bytes.tolist() == [4, 9, 0]


@pytest.mark.parametrize("text", UNICODE)
def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(
    text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    stream = tokenize([Document(text)], tokenizer)
    assert stream.token_bytes.sum() == len(text.encode())
    assert stream.token_bytes.min() >= 0


def test_offsets_that_go_back_give_no_negative_bytes() -> None:
    # Ends after "aé", "a", "aéb" and "aéb" of "aébc": the end rests with the last token.
    assert bytes_by_offset("aébc", np.array([2, 1, 3, 3])).tolist() == [3, 0, 1, 1]


def test_a_character_of_three_tokens_gives_its_bytes_once(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    stream = tokenize([Document("€x")], tokenizer)
    assert stream.token_bytes.tolist() == [3, 0, 0, 1, 0]


def test_bytes_add_up_across_many_documents_with_prompts(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    documents = [Document(text, prompt=prompt) for text in UNICODE for prompt in ("", *UNICODE)]
    stream = tokenize(documents, tokenizer)
    texts = sum(len(document.text.encode()) for document in documents)
    prompts = sum(len(document.prompt.encode()) for document in documents)
    assert stream.token_bytes[stream.loss_mask].sum() == texts
    assert stream.token_bytes[~stream.loss_mask].sum() == prompts


def test_batches_of_any_size_give_the_same_stream(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [Document(text, prompt="ask\n") for text in UNICODE]
    at_once = tokenize(documents, tokenizer)
    monkeypatch.setattr("fedpeat.data.packing._BATCH_CHARACTERS", 1)
    one_by_one = tokenize(documents, tokenizer)
    np.testing.assert_array_equal(at_once.input_ids, one_by_one.input_ids)
    np.testing.assert_array_equal(at_once.loss_mask, one_by_one.loss_mask)
    np.testing.assert_array_equal(at_once.token_bytes, one_by_one.token_bytes)


def test_a_slow_tokenizer_spreads_the_bytes_evenly_and_exactly() -> None:
    # "héé to x" has 10 bytes, and "red\n" 4.
    slow = SlowWords()  # type: ignore[no-untyped-call]
    stream = tokenize([Document("héé to x", prompt="red\n")], slow)
    assert stream.token_bytes.tolist() == [4, 3, 3, 4]


def test_byte_tokens_of_a_slow_tokenizer_have_a_byte_each() -> None:
    slow: PreTrainedTokenizerBase = ByT5Tokenizer()
    stream = tokenize([Document("hé"), Document("🙂")], slow)
    # ByT5's tokens are bytes + 3, and 1 ends a text.
    assert stream.input_ids.tolist() == [107, 198, 172, 1, 243, 162, 156, 133, 1]
    assert stream.token_bytes.tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 0]


def test_tokens_round_trip_to_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = tokenize([Document(UNICODE[2])], tokenizer)
    assert tokenizer.decode(stream.input_ids[:-1]) == UNICODE[2]


def test_special_tokens_that_a_tokenizer_adds_by_itself_are_left_out() -> None:
    tokenizer = word_tokenizer(**ENDING)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<b> $A <s>", special_tokens=[("<b>", 6), ("<s>", 7)]
    )
    assert tokenizer("red")["input_ids"] == [6, 1, 7]
    assert tokenize([Document("red")], tokenizer).input_ids.tolist() == [1, 5]


@pytest.mark.parametrize("tokenizer_kind", ["fast", "slow"])
def test_a_text_without_tokens_is_a_separator_alone(tokenizer_kind: str) -> None:
    slow = SlowWords()  # type: ignore[no-untyped-call]
    stream = tokenize(
        [Document(" ")], slow if tokenizer_kind == "slow" else word_tokenizer(**ENDING)
    )
    assert stream.input_ids.tolist() == ([] if tokenizer_kind == "slow" else [5])
    assert stream.token_bytes.sum() == 0


def test_no_documents_give_no_blocks(tokenizer: PreTrainedTokenizerFast) -> None:
    packed = pack([], tokenizer, block_size=4)
    assert packed.input_ids.shape == (0, 4)
    assert packed.input_ids.dtype == np.int32


def test_text_longer_than_the_model_context_is_not_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A tokenizer warns once only, so this one must be new.
    tokenizer = word_tokenizer(**ENDING)
    tokenizer.model_max_length = 16
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        packed = pack([Document("red " * 100)], tokenizer, block_size=8)
    finally:
        logger.removeHandler(caplog.handler)
    assert packed.num_tokens > tokenizer.model_max_length
    assert not caplog.records


def test_head_takes_the_first_blocks_and_no_more_than_there_are() -> None:
    assert blocks(3).head(2).input_ids.tolist() == [[0, 1], [2, 3]]
    assert blocks(3).head(9).num_examples == 3
    assert blocks(3).head(-1).num_examples == 0


def test_spread_takes_blocks_evenly_over_all() -> None:
    assert blocks(10).spread(4).input_ids[:, 0].tolist() == [0, 4, 10, 14]
    assert blocks(3).spread(3).num_examples == 3
    assert blocks(3).spread(7).num_examples == 3


def test_concatenate_keeps_the_order_of_parts() -> None:
    joined = PackedText.concatenate([blocks(1), blocks(2)])
    assert joined.input_ids.tolist() == [[0, 1], [0, 1], [2, 3]]
    assert joined.loss_mask.shape == joined.token_bytes.shape == (3, 2)


@pytest.mark.parametrize("sizes", [[], [2, 3]])
def test_concatenate_refuses_parts_without_a_common_block_size(sizes: list[int]) -> None:
    with pytest.raises(DataError, match="one block size in common"):
        PackedText.concatenate([blocks(1, size) for size in sizes])


def test_targets_leave_out_the_first_token_of_each_block() -> None:
    mask = np.array([[True, True, False], [True, False, True]])
    zeros = np.zeros((2, 3), np.int32)
    assert PackedText(zeros, mask, zeros).num_targets == 2
