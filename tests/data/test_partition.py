from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedpeat.config.schema import DataConfig
from fedpeat.core.errors import ConfigError, DataError
from fedpeat.data.documents import Document
from fedpeat.data.partition import (
    dirichlet,
    iid,
    largest_owners,
    natural,
    require_partition_settings,
)


def labelled(counts: dict[str, int]) -> list[Document]:
    return [Document(f"{key}{i}", label=key) for key, n in counts.items() for i in range(n)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_owners_come_by_amount_of_text_ties_by_name() -> None:
    pool = [Document("xx", key="b"), Document("x", key="c"), Document("xx", key="a")]
    pool.append(Document("xx", key="c"))
    assert [document.key for document in largest_owners(pool, None)] == ["c", "c", "a", "b"]
    assert [document.key for document in largest_owners(pool, 2)] == ["c", "c", "a"]


def test_prompts_count_as_text_of_an_owner() -> None:
    pool = [Document("xx", key="a"), Document("x", key="b", prompt="xxx")]
    assert [document.key for document in largest_owners(pool, 1)] == ["b"]


def test_more_clients_than_owners_is_an_error() -> None:
    with pytest.raises(DataError, match="at most the number of owners, 1, got 3"):
        largest_owners([Document("x", key="a")], 3)


def test_a_natural_partition_without_owners_is_an_error() -> None:
    with pytest.raises(DataError, match=r"give data\.key_field"):
        largest_owners([Document("x")], None)


def test_natural_gives_each_owner_its_documents_in_order() -> None:
    one, two, three = Document("1", key="b"), Document("2", key="a"), Document("3", key="b")
    clients = natural([one, two, three], 0, 1.0, rng())
    assert clients == {"b": (one, three), "a": (two,)}
    assert list(clients) == ["b", "a"]


def test_iid_deals_every_document_out_once_in_equal_shares() -> None:
    pool = labelled({"x": 11})
    clients = iid(pool, 3, 1.0, rng())
    assert list(clients) == ["client-00", "client-01", "client-02"]
    assert [len(share) for share in clients.values()] == [4, 4, 3]
    assert sorted(d.text for s in clients.values() for d in s) == sorted(d.text for d in pool)


def test_iid_shuffles() -> None:
    pool = labelled({"x": 40})
    assert iid(pool, 2, 1.0, rng())["client-00"] != tuple(pool[:20])
    assert iid(pool, 2, 1.0, rng(0)) == iid(pool, 2, 1.0, rng(0))
    assert iid(pool, 2, 1.0, rng(0)) != iid(pool, 2, 1.0, rng(1))


def test_client_names_sort_in_the_order_of_clients() -> None:
    names = list(iid(labelled({"x": 101}), 101, 1.0, rng()))
    assert names[0] == "client-000"
    assert names == sorted(names)


def test_dirichlet_deals_every_document_out_once() -> None:
    pool = labelled({"x": 50, "y": 31})
    clients = dirichlet(pool, 4, 0.5, rng())
    assert sorted(d.text for s in clients.values() for d in s) == sorted(d.text for d in pool)


def test_dirichlet_shares_follow_the_draw_of_each_label() -> None:
    clients = dirichlet(labelled({"x": 1_000, "y": 1_000}), 3, 0.7, rng(5))
    # The same generator, drawn from by hand in the same order: a shuffle, then proportions.
    twin = rng(5)
    for label in ("x", "y"):
        twin.permutation(1_000)
        borders = np.round(np.cumsum(twin.dirichlet([0.7] * 3))[:-1] * 1_000)
        sizes = np.diff([0, *borders, 1_000]).tolist()
        counted = [sum(d.label == label for d in share) for share in clients.values()]
        assert counted == sizes


def skew(alpha: float) -> float:
    """Return the mean over clients of the share of a client's commonest label."""
    clients = dirichlet(labelled(dict.fromkeys("abcdefgh", 200)), 4, alpha, rng())
    commonest = [Counter(d.label for d in s).most_common(1)[0][1] for s in clients.values()]
    return float(np.mean([n / len(s) for n, s in zip(commonest, clients.values(), strict=True)]))


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    assert skew(1e6) == pytest.approx(1 / 8, abs=0.01)
    assert skew(0.1) > 0.3


def test_an_empty_client_is_drawn_again() -> None:
    pool = labelled({"x": 8})
    first = np.round(np.cumsum(_first_proportions(1))[:-1] * 8)
    assert 0 in np.diff([0, *first, 8])
    assert all(dirichlet(pool, 3, 0.5, rng(1)).values())


def _first_proportions(seed: int) -> np.ndarray:
    generator = rng(seed)
    generator.permutation(8)
    return generator.dirichlet([0.5] * 3)


def test_clients_that_stay_empty_are_an_error() -> None:
    with pytest.raises(DataError, match=r"raise data.alpha \(1e-05\) or lower data.num_clients"):
        dirichlet(labelled({"x": 20}), 5, 1e-5, rng())


@pytest.mark.parametrize("partition", [iid, dirichlet])
def test_more_clients_than_documents_is_an_error(partition: object) -> None:
    assert callable(partition)
    with pytest.raises(DataError, match="left after holding out, 2, got 3"):
        partition(labelled({"x": 2}), 3, 1.0, rng())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(partition="iid"), "data.num_clients must be given .* 'iid', got None"),
        (DataConfig(partition="dirichlet"), "data.num_clients must be given"),
        (
            DataConfig(source="x.jsonl", partition="dirichlet", num_clients=2),
            "data.label_field must be given for data.partition 'dirichlet', got None",
        ),
    ],
)
def test_a_partition_asks_for_the_settings_it_needs(config: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_partition_settings(config)


@pytest.mark.parametrize(
    "config",
    [
        DataConfig(),
        DataConfig(partition="dirichlet", num_clients=2),
        DataConfig(source="x.csv", partition="dirichlet", num_clients=2, label_field="kind"),
    ],
)
def test_a_complete_partition_is_accepted(config: DataConfig) -> None:
    require_partition_settings(config)
