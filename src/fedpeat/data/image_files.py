"""Images in folders named after their classes, on disk or inside an archive."""

from __future__ import annotations

import io
import lzma
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
from jaxtyping import UInt8

from fedpeat.core.errors import DataError
from fedpeat.data.files import expand_home
from fedpeat.data.images import ImageInputs, LabelledImage

__all__ = ["ARCHIVES", "decode", "is_archive", "read_image_files"]

_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_FORMATS: Final = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
"""What Pillow may open; its readers of other formats can start programs."""
_DEEP: Final = {"I;16", "I;16B", "I;16L", "I", "F"}

_DAMAGES: Final = (
    *(OSError, EOFError, RuntimeError, NotImplementedError),  # the last two for unreadable zips
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)

Entry = tuple[PurePosixPath, Callable[[], bytes]]
Walk = Callable[[Path], Iterator[Entry]]


def is_archive(source: str) -> bool:
    """Return whether a source is named as an archive is."""
    return source.lower().endswith(tuple(ARCHIVES))


def read_image_files(
    source: str, split: str, maker: ImageInputs, *, must_be_named: bool = False
) -> list[LabelledImage]:
    """Read the images of a folder or archive, each in a folder named after its class.

    Folders of classes may lie in folders of splits (train/cat/1.png); then one split is read.

    Args:
        source: Folder or archive.
        split: Name of the folder to read where there are several.
        maker: Makes a network's inputs of the images.
        must_be_named: Whether the split's folder must be there even where there is only one.

    Raises:
        DataError: If the source is missing or damaged, has no images or no such split, or a file
            is no image.
    """
    path = expand_home(source)
    if not path.exists():
        raise DataError(f"no such folder or archive of images: {source!r}")
    walk = _walk_of(path)
    try:
        names = [name for name, _ in walk(path)]
        chosen = _split_of(source, names, split, must_be_named=must_be_named)
        images = {
            name: _labelled(f"{source}: {name}", name, content, maker)
            for name, content in walk(path)
            if name.parent.parent == chosen
        }
    except _DAMAGES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{source}: cannot be read to its end; is it whole? ({reason})") from error
    return [images[name] for name in sorted(images)]


def _walk_of(path: Path) -> Walk:
    if path.is_dir():
        return _walk_folder
    for suffix, walk in ARCHIVES.items():
        if path.name.lower().endswith(suffix):
            return walk
    raise DataError(
        f"{path}: has no images; model.task image_classification wants a folder with a folder for "
        f"each class, such a tree in an archive ({', '.join(ARCHIVES)}), or a dataset"
    )


def _walk_folder(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.rglob("*")):
        name = PurePosixPath(path.relative_to(folder).as_posix())
        if _is_image(name) and path.is_file():
            yield name, path.read_bytes


def _walk_tar(path: Path) -> Iterator[Entry]:
    def content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], bytes]:
        file = archive.extractfile(member)
        assert file is not None
        return file.read

    with tarfile.open(path) as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if member.isfile() and _is_image(name):
                yield name, content(archive, member)


def _walk_zip(path: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = PurePosixPath(info.filename)
            if not info.is_dir() and _is_image(name):
                yield name, lambda info=info: archive.read(info)  # type: ignore[misc]


ARCHIVES: Final[dict[str, Walk]] = {
    ".tar": _walk_tar,
    ".tar.gz": _walk_tar,
    ".tgz": _walk_tar,
    ".tar.xz": _walk_tar,
    ".tar.bz2": _walk_tar,
    ".zip": _walk_zip,
}


def _is_image(name: PurePosixPath) -> bool:
    is_hidden = any(part.startswith(".") and part != "." for part in name.parts)
    return name.suffix.lower() in _SUFFIXES and not is_hidden


def _split_of(
    source: str, names: list[PurePosixPath], split: str, *, must_be_named: bool
) -> PurePosixPath:
    """Return the folder with the folders of classes."""
    if not names:
        raise DataError(f"{source}: has no images ({', '.join(_SUFFIXES)})")
    for name in names:
        if len(name.parts) < 2:
            raise DataError(f"{source}: {name} must lie in a folder named after its class")
    folders = sorted({name.parent.parent for name in names})
    named = [folder for folder in folders if folder.name == split]
    if len(folders) == 1 and not must_be_named:
        named = folders
    if len(named) != 1:
        listing = ", ".join(str(folder) for folder in folders[:8])
        raise DataError(f"{source}: must have one folder {split!r} with classes, got {listing}")
    return named[0]


def _labelled(
    where: str, name: PurePosixPath, read: Callable[[], bytes], maker: ImageInputs
) -> LabelledImage:
    try:
        content = read()
    except _DAMAGES as error:
        raise DataError(f"{where}: cannot be read; is its source whole? ({error})") from error
    pixels, is_fitted = maker.smaller(decode(where, content, maker.num_channels))
    return LabelledImage(pixels, is_fitted, label=name.parent.name)


def decode(
    where: str, content: bytes, num_channels: int
) -> UInt8[np.ndarray, "channels height width"]:
    """Return the pixels of an image file, upright, in colours or greys.

    Raises:
        DataError: If it is no image, is damaged, has more than 8 bits a channel, or is so large
            that Pillow takes it for an attack.
    """
    # Imported here because only runs on images need it.
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            pixels = _upright(content, "L" if num_channels == 1 else "RGB")
    except UnidentifiedImageError as error:
        known = ", ".join(_FORMATS)
        raise DataError(f"{where}: is no image that can be read (none of {known})") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as error:
        raise DataError(f"{where}: is no image that can be read ({error})") from error
    return np.ascontiguousarray(np.moveaxis(np.atleast_3d(pixels), -1, 0))


def _upright(content: bytes, mode: str) -> UInt8[np.ndarray, "height width ..."]:
    from PIL import Image, ImageOps  # noqa: PLC0415

    with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode in _DEEP:
        raise ValueError(f"it must have 8 bits a channel, got mode {image.mode}")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert(mode))
