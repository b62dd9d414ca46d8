"""Write the images of the benchmarks: upright to pre-train on, turned ones to tune on.

Which digit goes where is decided by a hash of its file's name, so that nobody tunes on what the
model was trained on, and the test is of digits that nobody has seen.

    python benchmarks/prepare_images.py DATA/images/mnist_png.tar.gz build/benchmarks
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
from pathlib import Path

from PIL import Image


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def turned(content: bytes, degrees: float) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        rotated = image.rotate(degrees, resample=Image.Resampling.BILINEAR)
    out = io.BytesIO()
    rotated.save(out, "PNG")
    return out.getvalue()


def is_for_training(name: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32 < share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="archive with train/CLASS/* and test/CLASS/*")
    parser.add_argument("out", type=Path, help="folder to write upright.tar and turned.tar into")
    parser.add_argument("--share", type=float, default=0.5, help="of train/ to pre-train on")
    parser.add_argument("--degrees", type=float, default=45.0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with (
        tarfile.open(args.source) as archive,
        tarfile.open(args.out / "upright.tar", "w") as upright,
        tarfile.open(args.out / "turned.tar", "w") as devices,
    ):
        for member in archive:
            file = archive.extractfile(member) if member.name.count("/") == 2 else None
            if file is None:
                continue
            content, name = file.read(), member.name
            if name.startswith("train/") and is_for_training(name, args.share):
                add(upright, name, content)
                continue
            add(devices, name, turned(content, args.degrees))
            if name.startswith("test/"):
                add(upright, name, content)


if __name__ == "__main__":
    main()
