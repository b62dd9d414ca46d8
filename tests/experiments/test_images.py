"""Image classification: the main job, with accuracy as its metric."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fedpeat.config.loading import config_from_dict, override
from fedpeat.config.schema import Config
from fedpeat.experiments.run import run
from tiny import tiny_image_settings


@pytest.fixture
def config(vit_dir: Path, images_dir: Path, tmp_path: Path) -> Config:
    return config_from_dict(tiny_image_settings(vit_dir, images_dir, tmp_path))


def test_tuning_raises_the_accuracy_on_held_out_images(config: Config) -> None:
    longer = override(config, {"federated": {"num_rounds": 8}, "local": {"local_steps": 8}})
    quality = run(longer)["quality"]
    print(quality)
    assert quality["metric"] == "accuracy"
    assert quality["plug_in"] > quality["full_zero_shot"] + 0.2
