"""The tree of errors."""

from __future__ import annotations

import pytest

from fedpeat.core import errors

KINDS = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_a_fedpeat_error_that_ends_a_command_with_1_or_2(
    kind: type[errors.FedPEATError],
) -> None:
    assert issubclass(kind, errors.FedPEATError)
    faults_of_a_run = {errors.AggregationError, errors.FleetError, errors.StorageError}
    assert kind.exit_code == (1 if kind in faults_of_a_run else 2)


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not errors.FedPEATError])
def test_every_error_stands_in_the_tree_with_its_builtin_kind(
    kind: type[errors.FedPEATError],
) -> None:
    builtin = kind.__bases__[1]
    line = next(li for li in (errors.__doc__ or "").splitlines() if f" {kind.__name__} " in li)
    assert f"({builtin.__name__})" in line
    assert builtin in {ValueError, RuntimeError, OSError}


def test_storage_error_keeps_its_text() -> None:
    assert str(errors.StorageError("cannot write x: disk full")) == "cannot write x: disk full"
