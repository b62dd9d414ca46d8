"""Print requirements.lock: an exact version of everything that developing fedpeat needs.

The versions are those that pip finds for all extras together, resolved on the oldest supported
Python, because what supports that one supports the newer ones.

Example:
    python3.11 scripts/lock.py > requirements.lock
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

OLDEST_PYTHON = (3, 11)
HELD = ["torch==2.13.0"]
"""Versions chosen by hand: raise PyTorch on purpose, with the results that depend on it."""
CUDA = re.compile(r"(nvidia|cuda)-.*|triton")
"""PyTorch with CUDA brings these, each in an exact version; other builds have none."""
HEADER = """\
# Exact versions of everything that developing and testing fedpeat needs, on Python 3.11 to 3.13.
# Written by `make lock`; do not edit. PyTorch brings its own CUDA libraries where its build needs
# them."""


def resolve(requirements: list[str], pins: list[str]) -> list[str]:
    """Return ``name==version`` of everything that pip would install, sorted by name."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as constraints:
        constraints.write("\n".join(pins))
        constraints.flush()
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--quiet", "--report", "-", "--constraint", constraints.name, *requirements]
        report = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    found = [item["metadata"] for item in json.loads(report)["install"]]
    # A local version such as 2.13.0+cpu names a build of the same release.
    versions = {normalised(m["name"]): m["version"].partition("+")[0] for m in found}
    return [f"{n}=={v}" for n, v in sorted(versions.items()) if not CUDA.fullmatch(n)]


def normalised(name: str) -> str:
    """Return the name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    if sys.version_info[:2] != OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        sys.exit(f"the lock must be made with Python {wanted}, got {sys.version.split()[0]}")
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    everything = project["dependencies"] + [name for extra in extras.values() for name in extra]
    print(HEADER, *resolve(everything, HELD), sep="\n")


if __name__ == "__main__":
    main()
