"""Sharing documents (or images) out to clients, one function per partition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fedpeat.config.schema import DataConfig, Partition
from fedpeat.core.errors import ConfigError, DataError
from fedpeat.data.documents import Owned
from fedpeat.data.holdout import group_by_key

__all__ = ["PARTITIONERS", "largest_owners", "require_partition_settings"]


class Partitioner(Protocol):
    """Shares items out: (items, number of clients, alpha, generator) -> those of each client."""

    def __call__(
        self,
        documents: Sequence[Owned],
        num_clients: int,
        alpha: float,
        rng: np.random.Generator,
        /,
    ) -> dict[str, tuple[Owned, ...]]: ...


_MAX_DRAWS = 10


def require_partition_settings(config: DataConfig, *, labelled: bool = False) -> None:
    """Raise a ConfigError if the partition needs a setting that is not given.

    Args:
        config: The settings.
        labelled: Whether every source of its kind has labels.
    """
    if config.partition != "natural" and config.num_clients is None:
        raise ConfigError(
            f"data.num_clients must be given for data.partition {config.partition!r}, got None"
        )
    labelled = labelled or config.source == "stdlib" or config.label_field is not None
    if config.partition == "dirichlet" and not labelled:
        raise ConfigError("data.label_field must be given for data.partition 'dirichlet', got None")


def largest_owners(documents: Sequence[Owned], num_clients: int | None) -> tuple[Owned, ...]:
    """Return the documents of the owners with the most text, the largest owner first.

    Owners beyond ``num_clients`` are dropped with all their documents: nobody tunes on them, and
    they are in no held-out split either.

    Raises:
        DataError: If documents have no key, or there are fewer owners than ``num_clients``.
    """
    groups = group_by_key(documents)
    if "" in groups:
        raise DataError(
            "a natural partition needs owners: give data.key_field, or set data.partition to iid"
        )
    if num_clients is not None and num_clients > len(groups):
        raise DataError(
            f"data.num_clients must be at most the number of owners, {len(groups)}, "
            f"got {num_clients}; data.key_field names other owners, data.partition iid needs none"
        )
    sizes = {key: sum(d.size for d in group) for key, group in groups.items()}
    ordered = sorted(groups, key=lambda key: (-sizes[key], key))[:num_clients]
    return tuple(document for key in ordered for document in groups[key])


def natural(
    documents: Sequence[Owned], _num_clients: int, _alpha: float, _rng: np.random.Generator
) -> dict[str, tuple[Owned, ...]]:
    """Give each key's documents to the client of that name."""
    return {key: tuple(group) for key, group in group_by_key(documents).items()}


def iid(
    documents: Sequence[Owned], num_clients: int, _alpha: float, rng: np.random.Generator
) -> dict[str, tuple[Owned, ...]]:
    """Deal shuffled documents out in shares that differ by at most one document."""
    _require_enough(documents, num_clients)
    shares = np.array_split(rng.permutation(len(documents)), num_clients)
    return _name_clients(documents, [share.tolist() for share in shares])


def dirichlet(
    documents: Sequence[Owned], num_clients: int, alpha: float, rng: np.random.Generator
) -> dict[str, tuple[Owned, ...]]:
    """Share each label's documents out by a Dirichlet draw; small ``alpha``, strong skew.

    Raises:
        DataError: If a client got no document in each of ten draws.

    Source:
        Yurochkin et al. (2019), Bayesian nonparametric federated learning of neural networks,
        section 4: p_k ~ Dir(alpha) over the clients, for each label k.
    """
    _require_enough(documents, num_clients)
    labels = np.unique([document.label for document in documents], return_inverse=True)[1]
    for _ in range(_MAX_DRAWS):
        shares = _draw_shares(labels, num_clients, alpha, rng)
        if all(shares):
            return _name_clients(documents, shares)
    raise DataError(
        f"each of {_MAX_DRAWS} Dirichlet draws of {len(documents)} {_plural(documents)} left a "
        f"client without any; raise data.alpha ({alpha}) or lower data.num_clients ({num_clients})"
    )


def _draw_shares(
    labels: np.ndarray, num_clients: int, alpha: float, rng: np.random.Generator
) -> list[list[int]]:
    """Return the indices of the documents that each client gets."""
    shares: list[list[int]] = [[] for _ in range(num_clients)]
    for label in range(labels.max() + 1):
        members = rng.permutation(np.flatnonzero(labels == label))
        proportions = rng.dirichlet(np.full(num_clients, alpha))
        borders = np.round(np.cumsum(proportions)[:-1] * len(members)).astype(int)
        for share, chosen in zip(shares, np.split(members, borders), strict=True):
            share.extend(chosen.tolist())
    return shares


def _require_enough(documents: Sequence[Owned], num_clients: int) -> None:
    if num_clients > len(documents):
        raise DataError(
            f"data.num_clients must be at most the number of {_plural(documents)} that are left "
            f"after holding out, {len(documents)}, got {num_clients}"
        )


def _plural(documents: Sequence[Owned]) -> str:
    return documents[0].plural if documents else "examples"


def _name_clients(
    documents: Sequence[Owned], shares: list[list[int]]
) -> dict[str, tuple[Owned, ...]]:
    width = max(2, len(str(len(shares) - 1)))
    return {
        f"client-{number:0{width}d}": tuple(documents[index] for index in sorted(share))
        for number, share in enumerate(shares)
    }


PARTITIONERS: dict[Partition, Partitioner] = {
    "natural": natural,
    "iid": iid,
    "dirichlet": dirichlet,
}
