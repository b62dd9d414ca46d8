"""What is published holds together: built files, dependencies, pins and version numbers."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fedpeat

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "fedpeat"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """Return the project table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def package_files() -> set[str]:
    """Return the path of every file of the package, as it is inside a wheel."""
    files = (p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(PACKAGE.parent).as_posix() for p in files}


def test_wheel_holds_every_file_of_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert "fedpeat/py.typed" in names
    assert names == package_files()


def test_wheel_holds_the_license_word_for_word(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/licenses/LICENSE"))
        assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_sdist_holds_package_license_tests_and_lock(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    wanted = {"LICENSE", "requirements.lock", "tests/test_packaging.py"}
    assert wanted | {f"src/{name}" for name in package_files()} <= names


def imported_modules() -> set[str]:
    """Return the top-level name of every module that the package imports from elsewhere."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"fedpeat"}


def test_every_imported_package_is_declared(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    required = project["dependencies"] + extras["flower"] + extras["privacy"]
    declared = {canonicalize_name(Requirement(line).name) for line in required}
    distributions = metadata.packages_distributions()
    undeclared = {
        module
        for module in imported_modules()
        if not declared & {canonicalize_name(name) for name in distributions.get(module, [module])}
    }
    assert not undeclared


def test_lock_pins_one_version_that_every_declared_range_allows(project: dict[str, Any]) -> None:
    text = (ROOT / "requirements.lock").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


def test_version_is_the_same_in_project_module_and_citation(project: dict[str, Any]) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert project["version"] == fedpeat.__version__ == citation["version"]


def test_fedpeat_command_is_a_function_that_exists() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="fedpeat")
    assert callable(command.load())
