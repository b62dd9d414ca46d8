"""From documents to blocks of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int32, Int64
from transformers import PreTrainedTokenizerBase

from fedpeat.core.errors import DataError
from fedpeat.data.documents import Document
from fedpeat.data.examples import IGNORED

__all__ = ["PackedText", "TokenStream", "bytes_by_offset", "pack", "tokenize"]

_BATCH_CHARACTERS = 2_000_000


@dataclass(frozen=True, eq=False)
class PackedText:
    """Blocks of tokens, full to the last place: examples of predicting the next token.

    Attributes:
        input_ids: Tokens.
        loss_mask: True where a token is a target of the loss: text and separators, not prompts.
            The first token of a block has no context to be predicted from; whoever scores leaves
            it out.
        token_bytes: UTF-8 bytes of text that each token stands for [bytes]; 0 for separators.
    """

    input_ids: Int32[np.ndarray, "blocks block_size"]
    loss_mask: Bool[np.ndarray, "blocks block_size"]
    token_bytes: Int32[np.ndarray, "blocks block_size"]

    shift: ClassVar[int] = 1
    options: ClassVar[Mapping[str, bool]] = {"use_cache": False}

    @property
    def num_examples(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def tokens_per_example(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.size)

    @property
    def num_targets(self) -> int:
        """Tokens that a loss can be taken of, which leaves out the first of each block."""
        return int(self.loss_mask[:, 1:].sum())

    def inputs(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the tokens of some blocks as a network takes them."""
        return {"input_ids": self.input_ids[rows].astype(np.int64)}

    def labels(self, rows: np.ndarray) -> Int64[np.ndarray, "rows block_size"]:
        """Return the tokens of some blocks, ``IGNORED`` where they are no targets."""
        return np.where(self.loss_mask[rows], self.input_ids[rows], IGNORED).astype(np.int64)

    def num_bytes(self, rows: np.ndarray) -> int:
        """Return the bytes of text that the targets of some blocks stand for [bytes]."""
        return int((self.token_bytes[rows] * self.loss_mask[rows])[:, 1:].sum())

    def head(self, n: int) -> PackedText:
        """Return the first ``n`` blocks, or all if there are fewer."""
        return self._take(np.arange(min(max(n, 0), self.num_examples)))

    def spread(self, n: int) -> PackedText:
        """Return ``n`` blocks evenly spaced over all, or all if there are fewer."""
        if n >= self.num_examples:
            return self
        return self._take(np.arange(n) * self.num_examples // n)

    def _take(self, blocks: np.ndarray) -> PackedText:
        return PackedText(self.input_ids[blocks], self.loss_mask[blocks], self.token_bytes[blocks])

    @classmethod
    def concatenate(cls, parts: Sequence[PackedText]) -> PackedText:
        """Return the blocks of all parts, one part after the other.

        Raises:
            DataError: If there are no parts, or their blocks differ in size.
        """
        sizes = {part.input_ids.shape[1] for part in parts}
        if len(sizes) != 1:
            raise DataError(f"parts must have one block size in common, got {sorted(sizes)}")
        return cls(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([part.loss_mask for part in parts]),
            np.concatenate([part.token_bytes for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Tokens of documents one after the other, before they are cut; fields as in ``PackedText``."""

    input_ids: Int32[np.ndarray, " tokens"]
    loss_mask: Bool[np.ndarray, " tokens"]
    token_bytes: Int32[np.ndarray, " tokens"]

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.size)

    def cut(self, block_size: int) -> PackedText:
        """Return the stream in blocks, without the rest that is shorter than a block."""
        num_blocks = self.num_tokens // block_size
        kept, shape = num_blocks * block_size, (num_blocks, block_size)
        return PackedText(
            self.input_ids[:kept].reshape(shape),
            self.loss_mask[:kept].reshape(shape),
            self.token_bytes[:kept].reshape(shape),
        )


@dataclass(frozen=True)
class _Segment:
    """A text that is encoded by itself: a prompt, or a document's text."""

    text: str
    is_target: bool


def pack(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> PackedText:
    """Encode documents, end each with a separator and cut them into blocks; the rest is dropped."""
    return tokenize(documents, tokenizer).cut(block_size)


def tokenize(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """Encode documents without special tokens and end each with a separator, which is a target.

    The separator is the tokenizer's end-of-text token, or else its bos or sep token; a tokenizer
    with none of them gives no separators. A prompt is encoded apart from the text after it, as it
    is when the model is asked.

    The bytes of a document's tokens add up to the bytes of its prompt and text: what a tokenizer
    skips, such as spaces, counts for the next token (for the last one at the end), and of several
    tokens for one character the first has all its bytes. A slow tokenizer does not say where its
    tokens stand, so a text's bytes are spread evenly over its tokens. A text without any token,
    such as blanks to some tokenizers, has nowhere to put its bytes.
    """
    separator = _separator(tokenizer)
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    num_bytes: list[np.ndarray] = []
    for batch in _batches(documents):
        for segment, (segment_ids, segment_bytes) in zip(
            batch, _encode([segment.text for segment in batch], tokenizer), strict=True
        ):
            tail = separator if segment.is_target else separator[:0]
            ids += [segment_ids, tail]
            num_bytes += [segment_bytes, np.zeros_like(tail)]
            masks.append(np.full(len(segment_ids) + len(tail), segment.is_target))
    return TokenStream(_join(ids, np.int32), _join(masks, np.bool_), _join(num_bytes, np.int32))


def _join(parts: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype)


def _separator(tokenizer: PreTrainedTokenizerBase) -> Int32[np.ndarray, " tokens"]:
    choices = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id)
    return np.array([choice for choice in choices if choice is not None][:1], np.int32)


def _batches(documents: Sequence[Document]) -> Iterator[list[_Segment]]:
    """Yield segments in order, enough at once to keep the tokenizer busy, and memory small."""
    batch: list[_Segment] = []
    size = 0
    for document in documents:
        if document.prompt:
            batch.append(_Segment(document.prompt, is_target=False))
        batch.append(_Segment(document.text, is_target=True))
        size += document.num_characters
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens and bytes per token of each text, both int32 of shape ``(tokens,)``."""
    # verbose=False: texts longer than the model's context are expected here, they are cut later.
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    for number, (text, tokens) in enumerate(zip(texts, encoded["input_ids"], strict=True)):
        ids = np.array(tokens, np.int32)
        if tokenizer.is_fast:
            offsets = np.array(encoded["offset_mapping"][number], np.int64).reshape(-1, 2)
            yield ids, bytes_by_offset(text, offsets[:, 1])
        else:
            yield ids, _bytes_spread(len(text.encode()), len(ids))


def bytes_by_offset(text: str, ends: np.ndarray) -> Int32[np.ndarray, " tokens"]:
    """Return the bytes from the end of the token before to the end of each token.

    Args:
        text: The text that was encoded.
        ends: Index after the last character of each token [characters]; tokens that share a
            character may repeat it or go back.
    """
    if not len(ends):
        return np.empty(0, np.int32)
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x1_0000)
    positions = np.concatenate([[0], np.cumsum(widths)])
    reached = positions[np.maximum.accumulate(ends)]
    reached[-1] = positions[-1]
    return np.diff(reached, prepend=0).astype(np.int32)


def _bytes_spread(num_bytes: int, num_tokens: int) -> Int32[np.ndarray, " tokens"]:
    if not num_tokens:
        return np.empty(0, np.int32)
    return np.diff(np.arange(num_tokens + 1) * num_bytes // num_tokens).astype(np.int32)
