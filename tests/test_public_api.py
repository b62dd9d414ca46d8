"""The public names of the package and of its modules."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest

import fedpeat

NEED_FLOWER = (
    "fedpeat.federated.flower",
    "fedpeat.experiments.fleet",
    "fedpeat.experiments.join",
    "fedpeat.experiments.serve",
)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(fedpeat.__path__, "fedpeat.")
    if not module.name.endswith("__main__")
]


def load(name: str) -> ModuleType:
    if name.startswith(NEED_FLOWER) and find_spec("flwr") is None:
        pytest.skip("needs fedpeat[flower]")
    return import_module(name)


def in_order(name: str) -> tuple[int, str]:
    """Sort constants first, then classes, then functions, as ruff does."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("name", ["fedpeat", *MODULES])
def test_public_names_of_a_module_are_sorted_and_exist(name: str) -> None:
    module = load(name)
    public = getattr(module, "__all__", [])
    assert list(public) == sorted(set(public), key=in_order)
    for attribute in public:
        assert getattr(module, attribute) is not None


@pytest.mark.parametrize("name", MODULES)
def test_module_with_code_names_what_is_public(name: str) -> None:
    module = load(name)
    if not hasattr(module, "__path__"):
        assert hasattr(module, "__all__")


def test_public_names_of_the_package_are_few_and_stable() -> None:
    assert fedpeat.__all__ == [
        "Config",
        "FedPEATError",
        "compare",
        "evaluate_adapter",
        "export_adapter",
        "inspect",
        "load_config",
        "run",
        "write_report",
    ]


@pytest.mark.parametrize("name", fedpeat.__all__)
def test_public_name_of_the_package_is_what_its_own_module_defines(name: str) -> None:
    value = getattr(fedpeat, name)
    assert value.__name__ == name
    assert getattr(import_module(value.__module__), name) is value


def test_name_that_the_package_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fedpeat' has no attribute 'xyzzy'"):
        _ = fedpeat.xyzzy
