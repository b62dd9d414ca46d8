from __future__ import annotations

import pytest

from fedpeat.data.documents import Document
from fedpeat.data.holdout import HeldOut, hold_out, split_counts


def documents(counts: dict[str, int]) -> list[Document]:
    return [Document(f"{key}{i}", key=key) for key, n in counts.items() for i in range(n)]


def draw(pool: list[Document], seed: int = 0, *, by_key: bool = True) -> HeldOut[Document]:
    return hold_out(
        pool, validation_ratio=0.2, test_ratio=0.1, server_ratio=0.1, by_key=by_key, seed=seed
    )


@pytest.mark.parametrize(
    ("num_documents", "ratios", "counts"),
    [
        (10, (0.2, 0.1, 0.1), [2, 1, 1]),
        (100, (0.29, 0.0, 0.1), [29, 0, 10]),
        (5, (0.33, 0.33, 0.33), [1, 1, 1]),
        (4, (0.1, 0.1, 0.1), [1, 1, 1]),
        (3, (0.1, 0.1, 0.1), [1, 1, 0]),
        (1, (0.9, 0.05, 0.0), [0, 0, 0]),
        (0, (0.1, 0.1, 0.1), [0, 0, 0]),
    ],
)
def test_counts_are_rounded_down_but_at_least_one_while_one_is_left(
    num_documents: int, ratios: tuple[float, ...], counts: list[int]
) -> None:
    assert split_counts(num_documents, ratios) == counts


def test_parts_are_disjoint_and_complete() -> None:
    pool = documents({"a": 30, "b": 13})
    parts = draw(pool)
    together = [*parts.validation, *parts.test, *parts.server, *parts.rest]
    assert sorted(d.text for d in together) == sorted(d.text for d in pool)


def test_every_key_contributes_its_share() -> None:
    parts = draw(documents({"a": 30, "b": 10, "c": 5}))
    keys = [document.key for document in parts.validation]
    assert {key: keys.count(key) for key in "abc"} == {"a": 6, "b": 2, "c": 1}
    assert {document.key for document in parts.test} == {"a", "b", "c"}
    assert {document.key for document in parts.server} == {"a", "b", "c"}


def test_without_keys_the_share_is_of_all_documents() -> None:
    parts = draw(documents({"a": 5, "b": 5}), by_key=False)
    assert [len(part) for part in (parts.validation, parts.test, parts.server)] == [2, 1, 1]


def test_the_draw_is_random_by_seed_and_the_same_for_the_same_seed() -> None:
    pool = documents({"a": 50})
    assert draw(pool, seed=1) == draw(pool, seed=1)
    assert draw(pool, seed=1).validation != draw(pool, seed=2).validation
    assert draw(pool).validation != tuple(pool[:10])


def test_keys_of_one_size_are_drawn_from_independently() -> None:
    drawn = draw(documents({"a": 50, "b": 50})).validation
    numbers = {key: [d.text[1:] for d in drawn if d.key == key] for key in "ab"}
    assert numbers["a"] != numbers["b"]


def test_the_draw_from_one_key_does_not_depend_on_the_others() -> None:
    alone = draw(documents({"a": 20}))
    together = draw(documents({"b": 20, "a": 20}))
    assert alone.test == tuple(d for d in together.test if d.key == "a")
