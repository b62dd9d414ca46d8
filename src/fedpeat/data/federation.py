"""The text of a federation: read, held out, shared out and packed; and the sharing out of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import DataError
from fedpeat.data.documents import Corpus, Document, FederatedDocuments, Owned
from fedpeat.data.examples import FederatedData
from fedpeat.data.holdout import generator, hold_out
from fedpeat.data.packing import PackedText, TokenStream, tokenize
from fedpeat.data.partition import PARTITIONERS, largest_owners, require_partition_settings
from fedpeat.data.sources import read_corpus

__all__ = ["load_federated_documents", "load_federated_text", "load_own_text", "share_out"]

_MAX_NAMED = 5


def load_federated_text(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> FederatedData[PackedText]:
    """Read the source, hold documents out, share the others out to clients, and pack everything.

    Raises:
        ConfigError: If the partition needs a setting that is not given.
        DataError: If a source is missing or malformed, or a client or split has less than a block.
    """
    documents = load_federated_documents(config, seed)
    held_out = {
        name: _pack_held_out(name, split, tokenizer, config)
        for name, split in (("validation", documents.validation), ("test", documents.test))
    }
    return FederatedData(
        clients=_pack_clients(documents.clients, tokenizer, config),
        server=_pack_server(documents.server, tokenizer, config),
        validation=held_out["validation"],
        test=held_out["test"],
    )


def load_own_text(config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> PackedText:
    """Read and pack the text of one owner, who has all of the source.

    Raises:
        DataError: If the source is missing or malformed, or has less than a block.
    """
    stream = tokenize(tuple(read_corpus(config, seed=0).documents), tokenizer)
    if stream.num_tokens < config.block_size:
        raise DataError(
            f"{name} must have at least one block of {config.block_size} tokens in "
            f"{config.source}, got {stream.num_tokens} tokens"
        )
    return _pack_client(name, stream, config)


def load_federated_documents(config: DataConfig, seed: int) -> FederatedDocuments[Document]:
    """Read the source and share its documents out; nothing is tokenized yet."""
    require_partition_settings(config)
    return share_out(read_corpus(config, seed), config, seed)


def share_out(corpus: Corpus[Owned], config: DataConfig, seed: int) -> FederatedDocuments[Owned]:
    """Hold out what the source does not, and share the rest out to clients.

    A natural partition with ``num_clients`` takes the owners with the most text and drops the
    others before anything is held out, so that the held-out text is of the owners that take part.
    """
    pool = corpus.documents
    if config.partition == "natural":
        pool = largest_owners(pool, config.num_clients)
    parts = hold_out(
        pool,
        validation_ratio=config.validation_ratio if corpus.validation is None else 0.0,
        test_ratio=config.test_ratio if corpus.test is None else 0.0,
        server_ratio=config.server_ratio if corpus.server is None else 0.0,
        by_key=config.partition == "natural",
        seed=seed,
    )
    clients = PARTITIONERS[config.partition](
        parts.rest, config.num_clients or 0, config.alpha, generator(seed, "partition")
    )
    return FederatedDocuments(
        clients=clients,
        server=_first_given(corpus.server, parts.server),
        validation=_first_given(corpus.validation, parts.validation),
        test=_first_given(corpus.test, parts.test),
    )


def _first_given(own: Sequence[Owned] | None, drawn: tuple[Owned, ...]) -> tuple[Owned, ...]:
    return drawn if own is None else tuple(own)


def _pack_clients(
    clients: Mapping[str, tuple[Document, ...]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> dict[str, PackedText]:
    streams = {name: tokenize(documents, tokenizer) for name, documents in clients.items()}
    _require_blocks(streams, config)
    return {name: _pack_client(name, stream, config) for name, stream in streams.items()}


def _pack_client(name: str, stream: TokenStream, config: DataConfig) -> PackedText:
    text = stream.cut(config.block_size)
    if config.max_tokens_per_client is not None:
        text = text.spread(config.max_tokens_per_client // config.block_size)
    if config.max_examples_per_client is not None:
        text = text.spread(config.max_examples_per_client)
    _require_targets(f"client {name!r}", text)
    return text


def _require_blocks(streams: dict[str, TokenStream], config: DataConfig) -> None:
    """Raise a DataError that names the clients with less than a block, and what helps."""
    names = list(streams)
    small = [name for name in names if streams[name].num_tokens < config.block_size]
    if not small:
        return
    named = ", ".join(f"{name!r} ({streams[name].num_tokens})" for name in small[:_MAX_NAMED])
    others = f" and {len(small) - _MAX_NAMED} more" if len(small) > _MAX_NAMED else ""
    # Clients of a natural partition come by their amount of text: those before a small one suffice.
    num_enough = names.index(small[0])
    if config.partition == "natural" and num_enough:
        remedy = f"set data.num_clients to {num_enough} or fewer, or lower data.block_size"
    elif config.partition == "natural":
        remedy = "lower data.block_size"
    else:
        remedy = "lower data.num_clients or data.block_size"
    raise DataError(
        f"clients with fewer tokens than one block of data.block_size {config.block_size}: "
        f"{named}{others}; {remedy}"
    )


def _pack_server(
    documents: tuple[Document, ...], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> PackedText | None:
    if config.server_ratio == 0:
        return None
    remedy = (
        f"raise data.server_ratio ({config.server_ratio}), or set it to 0 for a server without text"
    )
    return _pack_split("server", documents, tokenizer, config.block_size, remedy)


def _pack_held_out(
    name: str,
    documents: tuple[Document, ...],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> PackedText:
    ratio = getattr(config, f"{name}_ratio")
    remedy = f"raise data.{name}_ratio ({ratio}), give data.{name}_source, or bring more documents"
    packed = _pack_split(name, documents, tokenizer, config.block_size, remedy)
    chosen = packed.spread(config.max_eval_blocks)
    _require_targets(f"the {name} split", chosen)
    return chosen


def _pack_split(
    name: str,
    documents: tuple[Document, ...],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    remedy: str,
) -> PackedText:
    if not documents:
        raise DataError(f"the {name} split has no documents; {remedy}")
    stream = tokenize(documents, tokenizer)
    if stream.num_tokens < block_size:
        raise DataError(
            f"the {name} split must have at least one block of data.block_size {block_size}, "
            f"got {stream.num_tokens} tokens; {remedy}"
        )
    packed = stream.cut(block_size)
    _require_targets(f"the {name} split", packed)
    return packed


def _require_targets(who: str, text: PackedText) -> None:
    """Raise a DataError if prompts fill every block, so that there would be no loss to take."""
    if not text.num_targets:
        raise DataError(f"{who} has only prompts in its blocks; raise data.block_size")
