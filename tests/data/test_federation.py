from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fedpeat.config.schema import DataConfig, Partition
from fedpeat.core.errors import ConfigError, DataError
from fedpeat.data import FederatedData, PackedText, load_federated_text
from fedpeat.data.federation import load_federated_documents

WORDS = "the cat sat on the mat and the dog sat on the log"


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def record(number: int, who: str) -> str:
    return f'{{"text": "{WORDS} {who} {number}", "who": "{who}", "kind": {number % 3}}}'


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Return a federation of ann, bob and cem with 40, 30 and 20 records."""
    counts = {"cem": 20, "ann": 40, "bob": 30}
    lines = [record(number, who) for who, count in counts.items() for number in range(count)]
    path = write_lines(tmp_path / "records.jsonl", lines)
    return DataConfig(source=str(path), key_field="who", label_field="kind", block_size=16)


def num_blocks(text: FederatedData[PackedText]) -> dict[str, int]:
    return {name: packed.num_examples for name, packed in text.clients.items()}


def same(first: PackedText, second: PackedText) -> bool:
    return all(
        np.array_equal(getattr(first, field.name), getattr(second, field.name))
        for field in dataclasses.fields(PackedText)
    )


def test_every_owner_gets_its_own_text_the_largest_first(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = load_federated_text(config, tokenizer, seed=0)
    assert list(text.clients) == ["ann", "bob", "cem"]
    for name, packed in text.clients.items():
        decoded = tokenizer.decode(packed.input_ids.ravel())
        assert name in decoded
        assert not [other for other in text.clients if other != name and other in decoded]
    assert text.server is not None


def test_documents_are_shared_out_without_overlap_or_loss(config: DataConfig) -> None:
    shared = load_federated_documents(config, seed=0)
    parts = [*shared.clients.values(), shared.server, shared.validation, shared.test]
    assert [len(part) for part in parts] == [28, 21, 14, 9, 9, 9]
    assert len({document.text for part in parts for document in part}) == 90


def test_the_same_seed_gives_the_same_text_and_another_seed_another(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    first, again = (load_federated_text(config, tokenizer, seed=1) for _ in range(2))
    other = load_federated_text(config, tokenizer, seed=2)
    assert same(first.validation, again.validation)
    assert all(same(first.clients[name], again.clients[name]) for name in first.clients)
    assert not same(first.validation, other.validation)


def test_owners_beyond_num_clients_are_dropped_from_every_split(config: DataConfig) -> None:
    shared = load_federated_documents(dataclasses.replace(config, num_clients=2), seed=0)
    assert list(shared.clients) == ["ann", "bob"]
    for part in (shared.server, shared.validation, shared.test):
        assert {document.key for document in part} == {"ann", "bob"}


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_drawn_partitions_name_their_clients_by_number(
    partition: Partition, config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = dataclasses.replace(config, partition=partition, num_clients=3, alpha=5.0)
    text = load_federated_text(config, tokenizer, seed=0)
    assert list(text.clients) == ["client-00", "client-01", "client-02"]


def test_a_server_ratio_of_0_gives_no_server_text(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = load_federated_text(dataclasses.replace(config, server_ratio=0.0), tokenizer, seed=0)
    assert text.server is None


def test_held_out_splits_may_come_from_files_of_their_own(
    config: DataConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    # They name no owner, so the fields of owners are not asked for.
    held_out = write_lines(tmp_path / "held.jsonl", [f'{{"text": "elsewhere {WORDS}"}}'] * 3)
    config = dataclasses.replace(config, validation_source=str(held_out))
    shared = load_federated_documents(config, seed=0)
    assert {document.text for document in shared.validation} == {f"elsewhere {WORDS}"}
    assert sum(map(len, shared.clients.values())) + len(shared.server) + len(shared.test) == 90


def test_a_text_that_is_tuned_on_cannot_be_held_out(config: DataConfig) -> None:
    folder = str(Path(config.source).parent)
    config = dataclasses.replace(config, source=folder, test_source=config.source)
    with pytest.raises(DataError, match=r"data.test_source .* share .*records.jsonl"):
        load_federated_documents(config, seed=0)


def test_a_validation_file_that_is_not_there_is_an_error(config: DataConfig) -> None:
    config = dataclasses.replace(config, validation_source="nowhere")
    with pytest.raises(DataError, match="no such file: 'nowhere'"):
        load_federated_documents(config, seed=0)


def test_clients_are_capped_at_whole_blocks_spread_over_their_text(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = load_federated_text(config, tokenizer, seed=0)
    capped = load_federated_text(
        dataclasses.replace(config, max_tokens_per_client=50), tokenizer, seed=0
    )
    assert num_blocks(capped) == {"ann": 3, "bob": 3, "cem": 3}
    assert same(capped.clients["ann"], whole.clients["ann"].spread(3))


def test_held_out_splits_are_capped_evenly(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = load_federated_text(config, tokenizer, seed=0)
    capped = load_federated_text(dataclasses.replace(config, max_eval_blocks=2), tokenizer, seed=0)
    assert capped.validation.num_examples == capped.test.num_examples == 2
    assert same(capped.validation, whole.validation.spread(2))
    assert capped.server is not None
    assert capped.server.num_examples > 2


def test_owners_with_less_than_a_block_are_named_with_a_number_that_works(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_lines(
        Path(config.source),
        [
            *(record(number, who) for who in ("ann", "bob") for number in range(30)),
            '{"text": "hm", "who": "eve", "kind": 0}',
        ],
    )
    with pytest.raises(DataError, match=r"'eve' \(\d+\); set data.num_clients to 2 or fewer"):
        load_federated_text(config, tokenizer, seed=0)
    text = load_federated_text(dataclasses.replace(config, num_clients=2), tokenizer, seed=0)
    assert list(text.clients) == ["ann", "bob"]


def test_many_small_owners_are_counted_not_listed(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    lines = [f'{{"text": "hm", "who": "w{n % 9}", "kind": 0}}' for n in range(90)]
    write_lines(Path(config.source), lines)
    config = dataclasses.replace(config, block_size=64, validation_ratio=0.3, test_ratio=0.3)
    with pytest.raises(DataError, match=r"and 4 more; lower data\.block_size"):
        load_federated_text(config, tokenizer, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_ratio": 0.0}, r"validation split has no documents; raise .* \(0.0\), give"),
        ({"test_ratio": 0.0}, "test split has no documents; raise data.test_ratio"),
        ({"block_size": 1_000}, "must have at least one block of data.block_size 1000, got"),
        ({"num_clients": 4}, "at most the number of owners, 3, got 4"),
    ],
)
def test_what_leaves_a_part_empty_is_an_error_that_names_the_setting(
    settings: dict[str, Any], message: str, config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=message):
        load_federated_text(dataclasses.replace(config, **settings), tokenizer, seed=0)


def test_owners_of_one_document_cannot_hold_any_out(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_lines(Path(config.source), [record(0, "ann"), record(0, "bob")])
    with pytest.raises(DataError, match="validation split has no documents"):
        load_federated_text(config, tokenizer, seed=0)


def test_blocks_of_nothing_but_prompts_are_an_error(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    lines = [f'{{"p": "{WORDS * 9}", "text": "x", "who": "ann", "kind": 0}}'] * 30
    write_lines(Path(config.source), lines)
    config = dataclasses.replace(config, prompt_field="p", block_size=2, max_eval_blocks=1)
    with pytest.raises(DataError, match=r"has only prompts in its blocks; raise data\.block_size"):
        load_federated_text(config, tokenizer, seed=0)


def test_a_client_of_nothing_but_prompts_is_named(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = [f'{{"p": "{WORDS * 9}", "text": "x", "who": "ann", "kind": 0}}'] * 3
    write_lines(Path(config.source), lines)
    held_out = str(write_lines(tmp_path / "held.csv", ["p,text", *[f",{WORDS}"] * 9]))
    other = str(write_lines(tmp_path / "other.csv", ["p,text", *[f",{WORDS}"] * 9]))
    config = dataclasses.replace(
        config,
        prompt_field="p",
        validation_source=held_out,
        test_source=other,
        server_ratio=0.0,
        block_size=4,
        max_tokens_per_client=4,
    )
    with pytest.raises(DataError, match="client 'ann' has only prompts in its blocks"):
        load_federated_text(config, tokenizer, seed=0)


def test_missing_settings_are_found_before_any_file_is_read(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = DataConfig(source="nowhere.txt", partition="iid")
    with pytest.raises(ConfigError, match=r"data\.num_clients"):
        load_federated_text(config, tokenizer, seed=0)


def test_the_standard_library_is_a_federation_by_itself(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = DataConfig(num_clients=3, max_tokens_per_client=1_280, max_eval_blocks=5)
    text = load_federated_text(config, tokenizer, seed=0)
    assert list(num_blocks(text).values()) == [10, 10, 10]
    assert (text.validation.num_examples, text.test.num_examples) == (5, 5)
    assert text.server is not None
    assert text.server.num_examples > 1_000
