from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import DataError
from fedpeat.data.documents import Document
from fedpeat.data.files import find_files, is_local, read_files, read_local_documents
from fedpeat.data.formats import split_text
from fedpeat.data.records import Fields

TEXT = Fields("text")


def read(path: Path, fields: Fields = TEXT) -> list[Document]:
    return list(read_local_documents(str(path), fields))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


RECORDS = [{"text": "one", "who": "ann"}, {"text": "two,\n2", "who": "bob"}]


def write_records(folder: Path, suffix: str) -> Path:
    path = folder / f"records{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
        return path
    contents = {
        ".csv": '\ufefftext,who\none,ann\n"two,\n2",bob\n',
        ".json": json.dumps(RECORDS),
        ".jsonl": "\ufeff" + "\n\n".join(json.dumps(record) for record in RECORDS),
    }
    return write(path, contents[suffix])


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_documents(suffix: str, tmp_path: Path) -> None:
    documents = read(write_records(tmp_path, suffix), Fields("text", key="who"))
    assert documents == [Document("one", key="ann"), Document("two,\n2", key="bob")]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_a_missing_field_is_named_with_the_closest_and_all_others(
    suffix: str, tmp_path: Path
) -> None:
    expected = r"no field 'txt' \(data.text_field\); did you mean 'text'\? fields: text, who"
    with pytest.raises(DataError, match=expected):
        read(write_records(tmp_path, suffix), Fields("txt"))


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_the_file_name_is_the_key_without_a_key_field(suffix: str, tmp_path: Path) -> None:
    documents = read(write_records(tmp_path, suffix))
    assert {document.key for document in documents} == {f"records{suffix}"}


def test_a_json_object_may_hold_the_list(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"version": 1, "data": RECORDS}))
    assert [document.text for document in read(path)] == ["one", "two,\n2"]


def test_prompt_and_context_each_end_with_a_line_break(tmp_path: Path) -> None:
    rows = [{"q": "why?", "c": "sky", "a": "blue"}, {"q": "who?", "c": "", "a": "me"}]
    path = write(tmp_path / "a.json", json.dumps(rows))
    documents = read(path, Fields("a", prompt="q", context="c"))
    assert [document.prompt for document in documents] == ["why?\nsky\n", "who?\n"]
    assert [document.text for document in documents] == ["blue", "me"]


def test_blank_and_null_texts_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": " \\n"}\n{"text": null}\n{"text": "x"}\n')
    assert [document.text for document in read(path)] == ["x"]


def test_numbers_are_names_of_owners_and_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x", "who": 7, "kind": 0}')
    (document,) = read(path, Fields("text", key="who", label="kind"))
    assert (document.key, document.label) == ("7", "0")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "y', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n["x"]', "a.jsonl, line 2: must be an object .* got list"),
        ("a.jsonl", '{"text": 3}', "line 1: field 'text' must be text, got int"),
        ("a.jsonl", '{"text": ["x"]}', "line 1: field 'text' must be text, got list"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1: field 'text' is not valid Unicode"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", "", "a.jsonl' has no text"),
        ("a.json", '[{"text": "x"}, ', "a.json: not valid JSON"),
        ("a.json", '"x"', "must hold a list of records, got str"),
        ("a.json", '[{"text": "x"}, 3]', "record 2: must be an object with fields, got int"),
        ("a.json", '{"a": [], "b": []}', "must hold exactly one list, got a, b"),
        ("a.json", "{}", "must hold exactly one list, got none"),
        ("a.csv", "text\nx,y\n", "a.csv, row 2: must have 1 columns, got 2"),
        ("a.csv", "text,who\nx\n", "a.csv, row 2: must have 2 columns, got 1"),
        ("a.csv", 'text\n"x', "a.csv: not valid CSV"),
        ("a.csv", "text,text\nx,y", "two columns have the same name"),
        ("a.csv", "", "a.csv' has no text"),
        ("a.parquet", "PAR1 truncated", "a.parquet: not a readable Parquet file"),
        ("a.parquet", "", "a.parquet: not a readable Parquet file"),
        ("a.txt", "\n \n", "a.txt' has no text"),
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8 text .byte 0xe9.; save it as UTF-8"),
        ("a.jsonl", b'{"text": "\xe9"}', "a.jsonl: not UTF-8 text"),
        ("a.csv", "text\nx".encode("utf-16"), "a.csv: not UTF-8 text"),
        ("a.json", b"\xff\xfe", "a.json: not UTF-8 text"),
    ],
)
def test_a_bad_file_is_one_clear_line(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(write(tmp_path / name, content))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["null", '""', '" "', "NaN", "[1]"])
def test_an_owner_without_a_name_is_an_error(value: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "x", "who": {value}}}')
    with pytest.raises(DataError, match="line 1: field 'who' must be a name or number, got"):
        read(path, Fields("text", key="who"))


def test_a_parquet_file_damaged_in_the_middle_is_one_clear_line(tmp_path: Path) -> None:
    path = write_records(tmp_path, ".parquet")
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"records\.parquet: not a readable Parquet file") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_empty_rows_of_a_csv_file_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,who\n\nx,ann\n\n")
    assert [document.text for document in read(path)] == ["x"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", "\ufeffx"), ("a.json", '\ufeff[{"text": "x"}]')]
)
def test_a_byte_order_mark_is_no_text(name: str, content: str, tmp_path: Path) -> None:
    assert [document.text for document in read(write(tmp_path / name, content))] == ["x"]


def test_a_csv_cell_may_be_longer_than_the_default_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\n" + "x" * 200_000)
    assert len(read(path)[0].text) == 200_000


def test_fields_of_a_text_file_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x")
    with pytest.raises(DataError, match=r"has no fields, but data\.key_field is 'who'"):
        read(path, Fields("text", key="who"))


def test_pieces_of_a_text_are_whole_paragraphs_that_join_to_it() -> None:
    text = "".join(f"{letter * 30}\n\n" for letter in "abcdef")
    pieces = split_text(text, max_characters=70)
    assert [len(piece) for piece in pieces] == [64, 64, 64]
    assert "".join(pieces) == text


@pytest.mark.parametrize(
    "text",
    ["", "x" * 95, "line\n" * 30, "\n\n" * 40, "a\n \n\t\nb", "end\n\n" + "y" * 45 + "\n\nz"],
)
def test_a_text_of_any_shape_is_cut_without_loss(text: str) -> None:
    pieces = split_text(text, max_characters=20)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 20 for piece in pieces)


def test_a_text_that_stands_alone_is_cut_into_pieces(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x" * 1_500 + "\n\n" + "y" * 1_500)
    config = DataConfig(source=str(path), partition="iid", num_clients=2)
    assert [document.key for document in read_files(config, 0).documents] == ["a.txt", "a.txt"]


def test_several_texts_are_whole_unless_each_is_an_owner(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, "x" * 1_500 + "\n\n" + "y" * 1_500)
    whole = DataConfig(source=str(tmp_path), partition="iid", num_clients=2)
    cut = DataConfig(source=str(tmp_path), partition="natural")
    assert len(read_files(whole, 0).documents) == 2
    assert [d.key for d in read_files(cut, 0).documents] == ["a.txt"] * 2 + ["b.txt"] * 2


def test_a_folder_gives_its_files_by_name_and_skips_hidden_and_unknown_ones(
    tmp_path: Path,
) -> None:
    for name in ("b.txt", "a/c.JSONL", ".hidden.txt", ".git/x.txt", "notes.md"):
        write(tmp_path / name, "x")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(str(tmp_path))]
    assert found == ["a/c.JSONL", "b.txt"]


def test_same_names_in_two_folders_are_two_owners(tmp_path: Path) -> None:
    for name in ("a/x.txt", "b/x.txt"):
        write(tmp_path / name, "x")
    documents = read_local_documents(str(tmp_path / "*" / "*.txt"), TEXT)
    assert [document.key for document in documents] == ["a/x.txt", "b/x.txt"]


def test_a_glob_gives_files_by_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.csv"):
        write(tmp_path / name, "x")
    assert [p.name for p in find_files(str(tmp_path / "*.txt"))] == ["a.txt", "b.txt"]


def test_a_file_with_brackets_in_its_name_is_no_glob(tmp_path: Path) -> None:
    path = write(tmp_path / "a[1].txt", "x")
    assert find_files(str(path)) == [path]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("trian.txt", r"no such file: .*trian.txt'; did you mean 'train.txt'\?"),
        ("nowhere/train.txt", "no such file"),
        ("*.csv", "no file matches"),
        ("empty", "has no file of a known format: .csv, .json, .jsonl, .parquet, .txt"),
        ("report.docx", "format must be one of .csv, .json, .jsonl, .parquet, .txt, got '.docx'"),
        ("x" * 5_000 + ".txt", "no such file"),
    ],
)
def test_a_path_that_gives_no_file_is_an_error(source: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "x")
    write(tmp_path / "report.docx", "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        find_files(str(tmp_path / source))


def test_paths_are_told_from_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "corpus" / "a.txt", "x")
    paths = [
        "x.txt",
        "x.PARQUET",
        "./x",
        "../x",
        "/x",
        "~/x",
        "~nobody/x",
        "a/*",
        "corpus",
        "C:\\x",
    ]
    assert [source for source in paths if not is_local(source)] == []
    hub_names = ["imdb", "Salesforce/wikitext", "owner/name-1.5"]
    assert [source for source in hub_names if is_local(source)] == []
