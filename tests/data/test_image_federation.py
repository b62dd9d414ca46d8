"""Who owns which images: folders, archives and datasets, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import ConfigError, DataError
from fedpeat.data.examples import FederatedData
from fedpeat.data.image_federation import class_numbers, load_federated_images, load_own_images
from fedpeat.data.images import ImageSet
from tiny import CLASSES, drawn_image, tiny_processor, write_images

pytestmark = pytest.mark.usefixtures("offline_datasets")

NAMED = dict(enumerate(CLASSES))
UNNAMED = {i: f"LABEL_{i}" for i in range(3)}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 30 images in train/ and 6 in test/."""
    folder = tmp_path_factory.mktemp("splits")
    write_images(folder / "train", per_class=10)
    write_images(folder / "test", per_class=2, seed=1)
    return folder


def config_of(source: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(
        source=str(source),
        **{"partition": "iid", "num_clients": 2, "server_ratio": 0.2, **settings},
    )


def load(
    config: DataConfig, labels: dict[int, str] = NAMED, seed: int = 0
) -> FederatedData[ImageSet]:
    return load_federated_images(config, tiny_processor(), labels, 1, seed)


def tarred(folder: Path, path: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.add(folder, arcname=".")
    return path


def zipped(folder: Path, path: Path) -> Path:
    return Path(shutil.make_archive(str(path.with_suffix("")), "zip", folder))


def counts(data: FederatedData[ImageSet]) -> dict[str, int]:
    parts = {"server": data.server, "validation": data.validation, "test": data.test}
    return {name: part.num_examples for name, part in {**data.clients, **parts}.items() if part}


def bytes_of(part: ImageSet) -> list[bytes]:
    return [image.tobytes() for image in part.pixels]


def test_every_image_has_one_owner(images_dir: Path) -> None:
    data = load(config_of(images_dir))
    assert counts(data) == {
        "client-00": 36,
        "client-01": 36,
        "server": 24,
        "validation": 12,
        "test": 12,
    }
    assert data.server is not None
    parts = (*data.clients.values(), data.server, data.validation, data.test)
    assert len({content for part in parts for content in bytes_of(part)}) == 120


def test_the_same_seed_gives_the_same_shares_and_another_gives_others(images_dir: Path) -> None:
    one, again, other = (load(config_of(images_dir), seed=seed) for seed in (1, 1, 2))
    assert bytes_of(one.clients["client-00"]) == bytes_of(again.clients["client-00"])
    assert bytes_of(one.clients["client-00"]) != bytes_of(other.clients["client-00"])


def test_a_dirichlet_partition_skews_the_classes(images_dir: Path) -> None:
    def skew(alpha: float) -> float:
        data = load(config_of(images_dir, partition="dirichlet", alpha=alpha, num_clients=3))
        shares = [np.bincount(c.classes, minlength=3) for c in data.clients.values()]
        return float(np.mean([share.max() / share.sum() for share in shares]))

    assert skew(1000.0) < 0.45
    assert skew(0.1) > 0.6


@pytest.mark.parametrize(
    "pack",
    [
        lambda folder, out: folder,
        lambda folder, out: tarred(folder, out / "a.tar", "w"),
        lambda folder, out: tarred(folder, out / "a.tar.gz", "w:gz"),
        lambda folder, out: zipped(folder, out / "a.zip"),
    ],
    ids=["folder", "tar", "tar.gz", "zip"],
)
def test_a_folder_and_its_archives_give_the_same(
    splits: Path, tmp_path: Path, pack: Callable[[Path, Path], Path]
) -> None:
    config = config_of(splits, test_source="test")
    packed = load(dataclasses.replace(config, source=str(pack(splits, tmp_path))))
    plain = load(config)
    assert counts(packed) == counts(plain)
    assert packed.test.num_examples == 6
    assert bytes_of(packed.clients["client-01"]) == bytes_of(plain.clients["client-01"])
    assert bytes_of(packed.test) == bytes_of(plain.test)


def test_classes_go_by_the_models_names(images_dir: Path) -> None:
    data = load(config_of(images_dir), labels={0: "edge", 1: "dot", 2: "bar"})
    bar = drawn_image(0, np.random.default_rng(0)).tobytes()  # the first of the folder "bar"
    assert data.server is not None
    parts = (*data.clients.values(), data.server, data.validation, data.test)
    found = [p.classes[i] for p in parts for i, content in enumerate(bytes_of(p)) if content == bar]
    assert found == [2]


def test_classes_without_names_in_the_model_are_numbers_or_are_counted() -> None:
    assert class_numbers({"1", "00"}, (), UNNAMED) == {"0": 0, "00": 0, "1": 1, "2": 2}
    assert class_numbers({"b", "a"}, (), UNNAMED) == {"a": 0, "b": 1}
    assert class_numbers({"b", "a"}, ("b", "c", "a"), UNNAMED)["a"] == 2


def test_an_owner_has_the_numbers_that_it_is_given(images_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(images_dir / "dot", tmp_path / "own" / "LABEL_1")
    config = config_of(tmp_path / "own")
    own = load_own_images(config, tiny_processor(), UNNAMED, 1, "ann")
    assert set(own.classes.tolist()) == {1}
    for labels in (NAMED, {0: "LABEL_0", 2: "LABEL_2"}):
        with pytest.raises(DataError, match="the model has no class for 'LABEL_1'; its "):
            load_own_images(config, tiny_processor(), labels, 1, "ann")


def test_all_classes_that_others_may_have_are_told(images_dir: Path, tmp_path: Path) -> None:
    assert load(config_of(images_dir)).classes == NAMED
    assert load(config_of(images_dir), UNNAMED).classes == dict(enumerate(CLASSES))
    for number, name in ((0, "bar"), (2, "dot")):
        shutil.copytree(images_dir / name, tmp_path / "numbers" / str(number))
    data = load(config_of(tmp_path / "numbers"), UNNAMED)
    assert data.classes == {0: "0", 1: "1", 2: "2"}


def test_the_cap_on_examples_is_one_on_images(images_dir: Path) -> None:
    data = load(config_of(images_dir, max_examples_per_client=5, max_eval_blocks=7))
    assert [part.num_examples for part in data.clients.values()] == [5, 5]
    assert (data.validation.num_examples, data.test.num_examples) == (7, 7)


# --- datasets -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset with images, classes with names, and an owner, in the Hub's form."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 6)):
        numbers = [i % 3 for i in range(count)]
        pictures = [Image.fromarray(drawn_image(number, rng)) for number in numbers]
        columns = {"image": pictures, "label": numbers, "site": [f"s{i % 2}" for i in range(count)]}
        features = datasets.Features(
            image=datasets.Image(),
            label=datasets.ClassLabel(names=list(CLASSES)),
            site=datasets.Value("string"),
        )
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def test_a_dataset_has_owners_and_splits_of_its_own(dataset: Path) -> None:
    config = config_of(dataset, partition="natural", key_field="site", test_source="test")
    data = load(dataclasses.replace(config, num_clients=None))
    assert list(data.clients) == ["s0", "s1"]
    assert data.test.classes.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_field": "img"}, r"no column 'img' \(data.image_field\); columns: image, label"),
        ({"label_field": "kind"}, r"no column 'kind' \(data.label_field\)"),
        ({"image_field": "site"}, r"column 'site' \(data.image_field\) must hold images, got"),
        ({"test_source": "train"}, "data.test_source must be another split than data.split"),
    ],
)
def test_a_dataset_that_lacks_something_is_named(
    dataset: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(config_of(dataset, **settings))


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_a_truncated_archive_is_named(splits: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".zip":
        zipped(splits, path)
    else:
        tarred(splits, path, "w:gz" if suffix == ".tar.gz" else "w")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"a{suffix}: cannot be read to its end; is it whole\?"):
        load(config_of(path))


def test_a_damaged_member_of_an_archive_is_named(splits: Path, tmp_path: Path) -> None:
    path = zipped(splits, tmp_path / "a.zip")
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("train/dot/003.png")
    content = bytearray(path.read_bytes())
    content[info.header_offset + 100] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="a.zip: .*003.png"):
        load(config_of(path))


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "a", per_class=4)
    (tmp_path / "a" / "dot" / "002.png").write_text("hello")
    with pytest.raises(DataError, match=r"a: dot/002\.png: is no image that can be read"):
        load(config_of(tmp_path / "a"))


def test_files_that_do_not_pretend_to_be_images_are_left_out(tmp_path: Path) -> None:
    write_images(tmp_path / "a", per_class=10)
    (tmp_path / "a" / "dot" / "notes.txt").write_text("hello")
    (tmp_path / "a" / "dot" / "._002.png").write_text("hidden")
    assert sum(counts(load(config_of(tmp_path / "a"))).values()) == 30


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({0: "bar", 1: "dot"}, "the model has no class for 'edge'; its 2 are bar, dot$"),
        ({0: "LABEL_0", 1: "LABEL_1"}, "the model has no class for 'edge'; its 2 are LABEL_0"),
        (
            {i: f"breed {i}" for i in range(100)},
            "no class for 'bar', 'dot', 'edge'; its 100 are breed 0, .*, breed 4, ...$",
        ),
    ],
    ids=["unknown", "more than the head", "other classes"],
)
def test_a_class_that_the_model_does_not_know_is_named(
    images_dir: Path, labels: dict[int, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(config_of(images_dir), labels)


def test_images_of_other_size_are_brought_to_the_networks(tmp_path: Path) -> None:
    data = load(config_of(write_images(tmp_path / "a", per_class=10, side=21)))
    assert {image.shape for image in data.test.pixels} == {(1, 8, 8)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": "dirichlet", "alpha": 0.001, "num_clients": 60}, "draws of 72 images left"),
        ({"num_clients": 100}, "at most the number of images that are left after holding out, 72"),
        ({"partition": "natural", "num_clients": None}, "a natural partition needs owners"),
        ({"server_ratio": 0.0, "test_ratio": 0.0}, "the test split has no images"),
        ({"test_source": "test"}, "must have one folder 'test' with classes, got ."),
    ],
)
def test_a_split_or_device_without_images_is_named(
    images_dir: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(config_of(images_dir, **settings))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("stdlib", "data.source 'stdlib' has no images"),
        ("./nowhere", "no such folder or archive of images: './nowhere'"),
        ("notes.txt", "notes.txt: has no images; model.task image_classification wants a folder"),
        ("texts", "texts: has no images"),
        ("flat", "1.png must lie in a folder named after its class"),
    ],
)
def test_a_source_without_images_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "flat").mkdir()
    for path in ("notes.txt", "texts/a.txt"):
        (tmp_path / path).write_text("hello")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "flat" / "1.png")
    with pytest.raises(DataError, match=message):
        load(config_of(source))


def test_a_test_source_that_is_tuned_on_is_refused(splits: Path) -> None:
    with pytest.raises(DataError, match="images that are tuned on cannot be held out"):
        load(config_of(splits, test_source=str(splits)))


def test_a_cap_on_tokens_is_refused_for_images(images_dir: Path) -> None:
    with pytest.raises(ConfigError, match="set data.max_examples_per_client"):
        load(config_of(images_dir, max_tokens_per_client=1000))


def test_a_dataset_row_that_is_no_image_is_named(tmp_path: Path) -> None:
    good = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(good, "PNG")
    cells = [{"bytes": good.getvalue(), "path": None}, {"bytes": b"hello", "path": None}]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    columns = {"image": cells, "label": ["dot", "dot"]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    (tmp_path / "README.md").write_text("---\n---\n")
    with pytest.raises(DataError, match="row 2: is no image that can be read"):
        load(config_of(tmp_path))
