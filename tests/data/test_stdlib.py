from __future__ import annotations

import itertools
import sysconfig
from pathlib import Path

import pytest

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import DataError
from fedpeat.data.documents import Corpus, Document
from fedpeat.data.stdlib import SERVER, read_stdlib


def read(config: DataConfig | None = None, seed: int = 0) -> Corpus[Document]:
    return read_stdlib(config or DataConfig(), seed)


def owners(corpus: Corpus[Document]) -> list[str]:
    return list(dict.fromkeys(document.key for document in corpus.documents))


@pytest.fixture
def fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a small standard library in place of the real one: two packages and a server module."""
    for package, size in (("json", 60_000), ("email", 40_000)):
        for number in range(4):
            path = tmp_path / package / f"part{number}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"# {package} {number}\n" + "x" * (size // 4))
    (tmp_path / "ast.py").write_text("# ast")
    paths = {"stdlib": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_path", paths.__getitem__)
    return tmp_path


def test_eight_packages_are_devices_and_modules_are_the_servers() -> None:
    corpus = read()
    assert len(owners(corpus)) == 8
    assert SERVER not in owners(corpus)
    assert {document.key for document in corpus.server or ()} == {SERVER}
    assert sum(document.num_characters for document in corpus.server or ()) > 500_000


def test_eight_owners_are_there_without_what_distributions_leave_out() -> None:
    # Without tkinter, idlelib, ensurepip and what Python 3.12 and 3.13 removed.
    always = {"asyncio", "email", "http", "importlib", "json", "multiprocessing", "unittest", "xml"}
    config = DataConfig(partition="iid", num_clients=1)
    assert always <= set(owners(read(config)))


def test_no_file_is_in_two_splits_or_lost() -> None:
    parts = read()
    texts = [
        [document.text for document in part or ()]
        for part in (parts.documents, parts.server, parts.validation, parts.test)
    ]
    nothing_held_out = read(DataConfig(validation_ratio=0.0, test_ratio=0.0))
    everything = [*nothing_held_out.documents, *(nothing_held_out.server or ())]
    assert sorted(itertools.chain(*texts)) == sorted(document.text for document in everything)
    assert nothing_held_out.validation == []


def test_held_out_files_come_from_devices_and_server() -> None:
    corpus = read()
    for part in (corpus.validation, corpus.test):
        keys = {document.key for document in part or ()}
        assert SERVER in keys
        assert len(keys) >= 4


def test_the_seed_moves_the_held_out_files_and_nothing_else_does() -> None:
    assert read(seed=1) == read(seed=1)
    assert read(seed=1).validation != read(seed=2).validation


def test_a_new_file_moves_no_other_file(fake_library: Path) -> None:
    before = read()
    (fake_library / "json" / "another.py").write_text("# another")
    after = read()
    for old, new in (
        (before.documents, after.documents),
        (before.validation, after.validation),
        (before.test, after.test),
    ):
        texts = {document.text for document in new or ()}
        assert {document.text for document in old or ()} == texts - {"# another"}


def test_owners_come_by_amount_of_text_and_num_clients_takes_the_largest(
    fake_library: Path,
) -> None:
    assert owners(read()) == ["json", "email"]
    assert owners(read(DataConfig(num_clients=1))) == ["json"]


def test_an_owner_with_little_text_is_not_offered(fake_library: Path) -> None:
    (fake_library / "email" / "part0.py").unlink()
    assert owners(read()) == ["json"]


def test_tests_site_packages_and_old_encodings_are_not_read(fake_library: Path) -> None:
    for name in ("json/test/a.py", "json/tests/b.py", "json/site-packages/c.py"):
        path = fake_library / name
        path.parent.mkdir()
        path.write_text("# forbidden")
    (fake_library / "json" / "latin.py").write_bytes("# forbidden é".encode("latin-1"))
    (fake_library / "json" / "empty.py").write_text("\n")
    no_hold_out = DataConfig(validation_ratio=0.0, test_ratio=0.0)
    texts = [document.text for document in read(no_hold_out).documents]
    assert len(texts) == 8
    assert not [text for text in texts if "forbidden" in text]


def test_a_server_ratio_of_0_leaves_the_server_without_text(fake_library: Path) -> None:
    no_hold_out = DataConfig(validation_ratio=0.0, test_ratio=0.0)
    assert [document.text for document in read(no_hold_out).server or ()] == ["# ast"]
    assert read(DataConfig(server_ratio=0.0)).server == []


def test_a_split_with_a_source_of_its_own_takes_no_files() -> None:
    config = DataConfig(validation_source="own.txt", test_source="other.txt")
    assert (read(config).validation, read(config).test) == ([], [])


def test_a_python_without_its_source_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path / "python.zip")}.__getitem__)
    with pytest.raises(DataError, match=r"no source files in .*python\.zip"):
        read()
