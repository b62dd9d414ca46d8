"""Images as a network takes them: exactly what the image processor makes, and small in memory."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from fedpeat.core.errors import DataError
from fedpeat.data.image_files import decode
from fedpeat.data.images import ImageInputs, ImageSet, LabelledImage

NUMBERS = {"bar": 0, "dot": 1}
PROCESSORS = ["ViT", "Beit", "Bit", "CLIP", "ConvNext", "MobileViT", "Levit", "DeiT"]


def processor(kind: str = "ViT", **settings: Any) -> Any:
    return getattr(transformers, f"{kind}ImageProcessorPil")(**settings)


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (channels, height, width)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def image_set(*images: np.ndarray, maker: ImageInputs) -> ImageSet:
    labelled = [LabelledImage(*maker.smaller(image), label="dot") for image in images]
    return ImageSet.of(labelled, NUMBERS, maker)


def png(mode: str = "RGB", size: tuple[int, int] = (4, 2), **settings: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG", **settings)
    return file.getvalue()


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("sides", [(20, 30), (400, 300)], ids=["small", "large"])
def test_inputs_are_those_that_the_processor_makes_in_one_go(
    kind: str, sides: tuple[int, int]
) -> None:
    whole, image = processor(kind), pixels(*sides)
    data = image_set(image, image, maker=ImageInputs(whole, 3))
    expected = whole([image], input_data_format="channels_first")["pixel_values"][0]
    for row in (0, 1):
        np.testing.assert_array_equal(data.inputs(np.array([row]))["pixel_values"][0], expected)


def test_of_large_images_only_the_networks_size_is_kept_and_small_ones_stay_small() -> None:
    maker = ImageInputs(processor(), 3)  # 224 by 224
    data = image_set(pixels(400, 300), pixels(28, 28), maker=maker)
    assert [image.shape for image in data.pixels] == [(3, 224, 224), (3, 28, 28)]
    assert data.fitted.tolist() == [True, False]
    assert data.inputs(np.arange(2))["pixel_values"].shape == (2, 3, 224, 224)


def test_a_processor_that_leaves_images_of_different_size_is_refused() -> None:
    maker = ImageInputs(processor("CLIP", do_center_crop=False), 3)
    data = image_set(pixels(300, 400), pixels(300, 500), maker=maker)
    with pytest.raises(DataError, match="must give all images one size, got .*224, 298"):
        data.inputs(np.arange(2))


def test_parts_are_joined_and_thinned_out_evenly() -> None:
    maker = ImageInputs(processor(size={"height": 2, "width": 2}), 3)
    data = ImageSet.concatenate([image_set(pixels(2, 2, seed=i), maker=maker) for i in range(6)])
    assert (data.num_examples, data.num_tokens, data.num_bytes(np.arange(6))) == (6, 6, 0)
    third = data.spread(3)
    assert [np.array_equal(a, data.pixels[i]) for a, i in zip(third.pixels, (0, 2, 4), strict=True)]
    assert third.labels(np.array([0, 2])).tolist() == [1, 1]


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_every_kind_of_picture_becomes_colours_or_greys(mode: str, num_channels: int) -> None:
    file = io.BytesIO()
    Image.new(mode, (4, 2)).save(file, "TIFF")
    assert decode("x", file.getvalue(), num_channels).shape == (num_channels, 2, 4)


def test_a_picture_is_turned_as_its_camera_says() -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    Image.new("RGB", (4, 2)).save(file, "JPEG", exif=exif)
    assert decode("x", file.getvalue(), 3).shape == (3, 4, 2)


def half() -> bytes:
    """Return the first half of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels(40, 40, 1)[0]).save(file, "PNG")
    return file.getvalue()[: file.tell() // 2]


def huge() -> bytes:
    """Return a PNG that says it has 10^10 pixels."""
    content = bytearray(png())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"hello", "none of PNG, JPEG"),
        (half(), "truncated"),
        (png("I;16"), "8 bits a channel, got mode I;16"),
        (huge(), "exceeds limit of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "none of PNG, JPEG"),
    ],
    ids=["text", "truncated", "16 bits", "huge", "a format that starts programs"],
)
def test_what_is_no_image_is_named(content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"^cat/1\.png: is no image that can be read.*{reason}"):
        decode("cat/1.png", content, 3)


def test_a_tiny_network_takes_them(vit_dir: Path) -> None:
    maker = ImageInputs(transformers.AutoImageProcessor.from_pretrained(vit_dir, backend="pil"), 1)
    model = transformers.ViTForImageClassification.from_pretrained(vit_dir)
    data = image_set(pixels(8, 8, 1), pixels(20, 9, 1), maker=maker)
    values = torch.from_numpy(data.inputs(np.arange(2))["pixel_values"])
    assert model(pixel_values=values).logits.shape == (2, 3)


def test_images_of_the_networks_size_are_kept_as_they_are_unless_they_are_cropped() -> None:
    image = pixels(224, 224)
    assert ImageInputs(processor(), 3).smaller(image)[0] is image
    cropping = ImageInputs(
        processor(size={"shortest_edge": 256}, do_center_crop=True, crop_size=224), 3
    )
    fitted, is_fitted = cropping.smaller(image)
    assert is_fitted
    assert fitted.shape == image.shape
    assert not np.array_equal(fitted, image)
