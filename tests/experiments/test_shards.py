"""What simulated devices have, written down so that real ones can have the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedpeat.config.loading import config_from_dict
from fedpeat.config.schema import Config
from fedpeat.core.errors import ConfigError, DataError
from fedpeat.data.image_files import read_image_files
from fedpeat.data.images import ImageInputs, ImageSet
from fedpeat.experiments.plugged import load_full_model
from fedpeat.experiments.shards import write_shards
from fedpeat.experiments.tasks import task_of
from tiny import CLASSES, IMAGE_SIZE, tiny_image_settings, tiny_settings


def config_of(vit: Path, images: Path, folder: Path, **data: Any) -> Config:
    settings: dict[str, Any] = tiny_image_settings(vit, images, folder)
    return config_from_dict({**settings, "data": {**settings["data"], **data}})


def inputs_of(images: ImageSet) -> tuple[list[int], bytes]:
    """Return what a network gets of all images, and their classes."""
    rows = np.arange(images.num_examples)
    return images.labels(rows).tolist(), images.inputs(rows)["pixel_values"].tobytes()


def test_text_goes_into_a_file_for_each_device(
    model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    config = config_from_dict(tiny_settings(model_dir, corpus_file, tmp_path / "runs"))
    paths = sorted(write_shards(config, tmp_path / "shards"))
    assert [path.name for path in paths] == [f"site-{number}.jsonl" for number in range(4)]
    assert sorted(write_shards(config, tmp_path / "shards")) == paths  # the same again
    lines = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert {line["key"] for line in lines} == {"site-0"}
    assert all(set(line) == {"text", "prompt", "label", "key"} for line in lines)


@pytest.mark.parametrize("side", [IMAGE_SIZE, IMAGE_SIZE // 2, 3 * IMAGE_SIZE])
def test_images_are_read_back_as_the_simulated_device_has_them(
    vit_dir: Path, tmp_path: Path, side: int
) -> None:
    rng = np.random.default_rng(side)
    for name in CLASSES:
        (tmp_path / "images" / name).mkdir(parents=True)
        for place in range(30):
            noise = rng.integers(0, 256, (side, side)).astype(np.uint8)
            Image.fromarray(noise).save(tmp_path / f"images/{name}/{place:03}.png")
    config = config_of(vit_dir, tmp_path / "images", tmp_path / "runs")
    loaded = load_full_model(config)
    clients = task_of(config).read(config, loaded).clients
    paths = write_shards(config, tmp_path / "shards")
    assert [path.name for path in paths] == list(clients)
    for path, own in zip(paths, clients.values(), strict=True):
        maker = ImageInputs(loaded.processor, 1)
        read = read_image_files(str(path), "train", maker)
        numbers = {name: number for number, name in enumerate(CLASSES)}
        assert isinstance(own, ImageSet)
        assert inputs_of(ImageSet.of(read, numbers, maker)) == inputs_of(own)


def test_no_folder_is_written_over(vit_dir: Path, images_dir: Path, tmp_path: Path) -> None:
    config = config_of(vit_dir, images_dir, tmp_path / "runs")
    (tmp_path / "shards" / "client-01").mkdir(parents=True)
    with pytest.raises(ConfigError, match="client-01 is there already; name another folder"):
        write_shards(config, tmp_path / "shards")
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["client-01"]


@pytest.mark.parametrize("name", ["../site", "a/site", ".site", "a\0site"])
def test_names_that_no_file_can_have_are_refused(
    model_dir: Path, corpus_file: Path, tmp_path: Path, name: str
) -> None:
    text = corpus_file.read_text().replace('"site-0"', json.dumps(name))
    (tmp_path / "corpus.jsonl").write_text(text)
    config = config_from_dict(
        tiny_settings(model_dir, tmp_path / "corpus.jsonl", tmp_path / "runs")
    )
    with pytest.raises(DataError, match="a device must have a name that a file can have, got"):
        write_shards(config, tmp_path / "shards")
    assert not list((tmp_path / "shards").iterdir())


def test_a_class_that_no_folder_can_have_is_refused(
    vit_dir: Path, images_dir: Path, tmp_path: Path
) -> None:
    vit = tmp_path / "vit"
    shutil.copytree(vit_dir, vit)
    settings = json.loads((vit / "config.json").read_text())
    settings["id2label"] = {**settings["id2label"], "2": ".edge"}
    (vit / "config.json").write_text(json.dumps(settings))
    shutil.copytree(images_dir, tmp_path / "images", ignore=shutil.ignore_patterns("edge"))
    config = config_of(vit, tmp_path / "images", tmp_path / "runs")
    with pytest.raises(DataError, match="a class must have a name .* got '.edge'"):
        write_shards(config, tmp_path / "shards")
