"""Images with a class each, as a network takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from fedpeat.core.errors import DataError

__all__ = ["ImageInputs", "ImageSet", "LabelledImage"]

_SHAPING = ("do_resize", "do_center_crop", "do_crop", "do_pad", "do_thumbnail", "do_convert_rgb")
"""Steps of an image processor that decide an image's size; the others change its values."""


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """An image that is never cut between owners or splits.

    Attributes:
        pixels: Its pixels, as in the file or as ``ImageInputs.fit`` gives them.
        is_fitted: Whether they are as ``ImageInputs.fit`` gives them.
        label: Its class.
        key: The natural owner; empty if there is none.
    """

    pixels: UInt8[np.ndarray, "channels height width"]
    is_fitted: bool
    label: str
    key: str = ""

    plural: ClassVar[str] = "images"

    @property
    def size(self) -> int:
        return 1


class ImageInputs:
    """Makes a network's inputs of images with the image processor that comes with it.

    The processor's steps are taken in two parts: those that decide the size, which may be done once
    for all, and those that change values (rescale, normalise), which are done for each batch, so
    that images stay bytes in memory.

    Args:
        processor: The image processor, with NumPy behind it.
        num_channels: Channels that the network takes: 3 for colours, 1 for greys.
    """

    def __init__(self, processor: Any, num_channels: int) -> None:
        self.num_channels = num_channels
        self._processor = processor
        self._fitted_size = 0
        self._kept_shapes: dict[tuple[int, ...], bool] = {}

    def fit(
        self, pixels: UInt8[np.ndarray, "channels height width"]
    ) -> UInt8[np.ndarray, "channels new_height new_width"]:
        """Return an image in the size that the network takes.

        Raises:
            DataError: If the processor makes something else than an image of an image.
        """
        made: np.ndarray = self._call([pixels], off=self._valuing)["pixel_values"][0]
        if made.dtype != np.uint8 or made.ndim != 3:
            raise DataError(
                f"{type(self._processor).__name__} must make one image of an image, got "
                f"{made.dtype} of shape {made.shape}; model.task image_classification needs that"
            )
        self._fitted_size = int(made.size)
        return made

    def values(
        self, images: Sequence[UInt8[np.ndarray, "_ _ _"]]
    ) -> Float32[np.ndarray, "images channels height width"]:
        """Return fitted images as the network takes them."""
        if len(sizes := {image.shape for image in images}) > 1:
            raise DataError(
                f"{type(self._processor).__name__} must give all images one size, got "
                f"{sorted(sizes)[:3]}; set its size to a height and a width"
            )
        made = self._call(images, off=self._shaping)["pixel_values"]
        return np.stack(made).astype(np.float32)

    def smaller(
        self, pixels: UInt8[np.ndarray, "channels height width"]
    ) -> tuple[UInt8[np.ndarray, "channels new_height new_width"], bool]:
        """Return an image, fitted if it is not smaller than fitted ones, and whether it was."""
        if pixels.size < self._fitted_size:
            return pixels, False
        return pixels if self._keeps(pixels.shape) else self.fit(pixels), True

    def _keeps(self, shape: tuple[int, ...]) -> bool:
        """Say whether images of a shape have the network's size already; noise is the probe."""
        if shape not in self._kept_shapes:
            noise = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
            self._kept_shapes[shape] = np.array_equal(self.fit(noise), noise)
        return self._kept_shapes[shape]

    def _call(self, images: Sequence[np.ndarray], off: Mapping[str, bool]) -> Mapping[str, Any]:
        made: Mapping[str, Any] = self._processor(
            list(images), input_data_format="channels_first", **off
        )
        return made

    @cached_property
    def _shaping(self) -> dict[str, bool]:
        return {name: False for name in self._steps if name in _SHAPING}

    @cached_property
    def _valuing(self) -> dict[str, bool]:
        return {name: False for name in self._steps if name not in _SHAPING}

    @property
    def _steps(self) -> list[str]:
        return [name for name in self._processor.valid_kwargs.__annotations__ if name[:3] == "do_"]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with the number of a class each, of any size, as bytes.

    Attributes:
        pixels: Each image, (channels, height, width).
        fitted: Whether each has the network's size already.
        classes: The class of each.
        maker: Makes the network's inputs of them.
    """

    pixels: tuple[UInt8[np.ndarray, "_ _ _"], ...]
    fitted: Bool[np.ndarray, " images"]
    classes: Int64[np.ndarray, " images"]
    maker: ImageInputs

    shift: ClassVar[int] = 0
    options: ClassVar[Mapping[str, bool]] = {}
    tokens_per_example: ClassVar[int] = 1

    @classmethod
    def of(
        cls, images: Sequence[LabelledImage], numbers: Mapping[str, int], maker: ImageInputs
    ) -> ImageSet:
        """Return images with the numbers of their labels."""
        return cls(
            tuple(image.pixels for image in images),
            np.array([image.is_fitted for image in images], np.bool_),
            np.array([numbers[image.label] for image in images], np.int64),
            maker,
        )

    @property
    def num_examples(self) -> int:
        return len(self.pixels)

    @property
    def num_tokens(self) -> int:
        return self.num_examples

    def inputs(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return images in the network's size, their values normalised."""
        images = [
            self.pixels[row] if self.fitted[row] else self.maker.fit(self.pixels[row])
            for row in rows.tolist()
        ]
        return {"pixel_values": self.maker.values(images)}

    def labels(self, rows: np.ndarray) -> Int64[np.ndarray, " rows"]:
        """Return the classes of some images."""
        chosen: np.ndarray = self.classes[rows]
        return chosen

    def num_bytes(self, rows: np.ndarray) -> int:
        """Return 0: there is no text."""
        return 0

    def spread(self, n: int) -> ImageSet:
        """Return ``n`` images evenly spaced over all, or all if there are fewer."""
        if n >= self.num_examples:
            return self
        rows = np.arange(n) * self.num_examples // n
        chosen = tuple(self.pixels[row] for row in rows.tolist())
        return ImageSet(chosen, self.fitted[rows], self.classes[rows], self.maker)

    @classmethod
    def concatenate(cls, parts: Sequence[ImageSet]) -> ImageSet:
        """Return the images of all parts, one part after the other."""
        return cls(
            tuple(pixels for part in parts for pixels in part.pixels),
            np.concatenate([part.fitted for part in parts]),
            np.concatenate([part.classes for part in parts]),
            parts[0].maker,
        )
