"""The errors that fedpeat raises, each also of the builtin kind that a caller would expect.

    FedPEATError
    ├── ConfigError       (ValueError)    a setting is unknown, of the wrong type or out of range
    ├── DataError         (ValueError)    a corpus is missing, empty, malformed or too small
    ├── ModelError        (ValueError)    a model cannot be found or loaded
    ├── SplitError        (ValueError)    a model cannot be cut as asked
    ├── EmulatorError     (ValueError)    an emulator cannot be built, or its file is damaged
    ├── AdapterError      (ValueError)    an adapter cannot be attached, loaded or exported
    ├── CheckpointError   (ValueError)    a checkpoint is missing, damaged or of another run
    ├── WireError         (ValueError)    a message does not follow the wire format
    ├── WorldError        (ValueError)    an edge world or its workload cannot be
    ├── CalibrationError  (ValueError)    a log cannot be fitted, or its fit not be trusted
    ├── AggregationError  (RuntimeError)  a round leaves nothing to aggregate
    ├── FleetError        (RuntimeError)  a program of a fleet does not do what it should
    └── StorageError      (OSError)       the run folder cannot be written

A command ends with ``exit_code``: 2 where the input must be changed, 1 where a run failed.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "AggregationError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EmulatorError",
    "FedPEATError",
    "FleetError",
    "ModelError",
    "SplitError",
    "StorageError",
    "WireError",
    "WorldError",
]


class FedPEATError(Exception):
    """Any error that fedpeat raises on purpose; its text is one line that a user can act on."""

    exit_code: int = 2


class ConfigError(FedPEATError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(FedPEATError, ValueError):
    """A corpus is missing, empty, malformed or too small."""


class ModelError(FedPEATError, ValueError):
    """A model cannot be found or loaded."""


class SplitError(FedPEATError, ValueError):
    """The model cannot be cut as asked."""


class EmulatorError(FedPEATError, ValueError):
    """An emulator cannot be built, or its file is not what it claims to be."""


class AdapterError(FedPEATError, ValueError):
    """An adapter cannot be attached, loaded or exported."""


class CheckpointError(FedPEATError, ValueError):
    """A checkpoint is missing, damaged or of another run."""


class WireError(FedPEATError, ValueError):
    """A message does not follow the wire format."""


class WorldError(FedPEATError, ValueError):
    """An edge world, its devices or its workload cannot be as described."""


class CalibrationError(FedPEATError, ValueError):
    """A log of rounds cannot be fitted, or the fit is missing, damaged or too far off."""


class AggregationError(FedPEATError, RuntimeError):
    """A round leaves nothing to aggregate."""

    exit_code = 1


class FleetError(FedPEATError, RuntimeError):
    """A program that a fleet consists of does not do what it should."""

    exit_code = 1


class StorageError(FedPEATError, OSError):
    """The run folder cannot be written."""

    exit_code = 1
