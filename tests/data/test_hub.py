from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import DataError
from fedpeat.data.sources import read_corpus, source_kind

pytestmark = pytest.mark.usefixtures("offline_datasets")


@pytest.fixture
def dataset_folder(tmp_path: Path) -> str:
    """Write a dataset in the Hub's form: a card and one Parquet file for each split."""
    folder = tmp_path / "speeches"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Speeches\n")
    for split, words in {
        "train": ["to be", "or not"],
        "validation": ["that"],
        "test": [" "],
    }.items():
        rows = [{"text": text, "who": "hamlet", "act": 3} for text in words]
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(folder)


def test_a_dataset_folder_is_read_split_by_split(dataset_folder: str) -> None:
    config = DataConfig(source=dataset_folder, key_field="who", validation_source="validation")
    corpus = read_corpus(config, seed=0)
    assert [(d.key, d.text) for d in corpus.documents] == [
        ("hamlet", "to be"),
        ("hamlet", "or not"),
    ]
    assert [d.text for d in corpus.validation or ()] == ["that"]
    assert corpus.test is None


def test_a_folder_with_an_ordinary_readme_is_local_files(dataset_folder: str) -> None:
    assert source_kind(dataset_folder) == "hub"
    (Path(dataset_folder) / "README.md").write_text("# My files\n")
    assert source_kind(dataset_folder) == "files"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "trian"}, "cannot load split 'trian' of dataset '.*speeches'"),
        ({"subset": "nope"}, "cannot load split 'train' of dataset '.*speeches'"),
        ({"split": "test"}, "split 'test': field 'text' has no text"),
        ({"text_field": "txt"}, r"no field 'txt' .*did you mean 'text'\? fields: text, who, act"),
        ({"text_field": "act"}, "row 1: field 'act' must be text, got int"),
        ({"validation_source": "train"}, "must be another split than data.split, got 'train'"),
        ({"test_source": "./test.txt"}, "no such file: './test.txt'"),
    ],
)
def test_what_a_dataset_lacks_is_one_clear_line(
    settings: dict[str, Any], message: str, dataset_folder: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_corpus(DataConfig(source=dataset_folder, **settings), seed=0)
    assert "\n" not in str(caught.value)


def test_a_hub_name_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(DataError, match="dataset 'nobody/nothing-like-this'"):
        read_corpus(DataConfig(source="nobody/nothing-like-this"), seed=0)
