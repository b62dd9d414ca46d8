"""LoRA's algebra against dense NumPy, which forms the products that the package never forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedpeat.adapter.lora import (
    best_pair,
    check_only_pairs,
    lora_pairs,
    mean_of_products,
    part_of,
    product_error,
    shape_at_rank,
    truncated,
)
from fedpeat.adapter.tunable import attach
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import AdapterError
from fedpeat.model.blocks import find_blocks
from tiny import CONFIGS, tiny_model

SHAPES = {"q_proj": (7, 9), "down_proj": (12, 5)}  # d_out, d_in
WEIGHTS = [0.5, 0.3, 0.2]
State = dict[str, np.ndarray]


def pairs_of(r: int, seed: int = 0, dtype: type = np.float32) -> State:
    rng = np.random.default_rng(seed)
    state: State = {}
    for name, (d_out, d_in) in SHAPES.items():
        state[f"{name}.lora_A.weight"] = rng.normal(size=(r, d_in)).astype(dtype)
        state[f"{name}.lora_B.weight"] = rng.normal(size=(d_out, r)).astype(dtype)
    return state


def product(state: State, name: str) -> np.ndarray:
    b, a = (state[f"{name}.lora_{x}.weight"].astype(np.float64) for x in "BA")
    dense: np.ndarray = b @ a
    return dense


def mean_product(states: list[State], name: str, weights: list[float] = WEIGHTS) -> np.ndarray:
    products = [product(state, name) for state in states]
    mean: np.ndarray = np.average(products, axis=0, weights=weights)
    return mean


def cut_by_dense_svd(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix)
    nearest: np.ndarray = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return nearest


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_of_lora_on_a_language_model_is_in_a_pair(kind: str) -> None:
    model = tiny_model(kind)  # GPT-2's layers are Conv1D
    adapter = attach(model, find_blocks(model), [0, 5], AdapterConfig(r=2)).state()
    check_only_pairs(adapter)
    pairs = lora_pairs(adapter)
    assert sorted(itertools.chain(*pairs)) == sorted(adapter)
    for name_a, name_b in pairs:
        assert (len(adapter[name_a]), adapter[name_b].shape[1]) == (2, 2)
        assert name_b == name_a.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x.lora_magnitude_vector", (4,)),
        ("x.lora_embedding_A", (2, 4)),
        ("x.ia3_l", (4, 1)),
        ("conv.lora_A.weight", (2, 4, 3, 3)),
        ("experts.lora_B.weight", (8, 4, 2)),
        ("alone.lora_A.weight", (2, 4)),
    ],
)
def test_a_tensor_that_is_in_no_pair_of_matrices_is_named(
    name: str, shape: tuple[int, ...]
) -> None:
    other = {name: np.zeros(shape)}
    twin = name.replace("lora_A", "lora_B") if "conv" in name else "q_proj.lora_A.weight"
    adapter = {**pairs_of(2), twin: np.zeros((4, 2, 1, 1) if "conv" in name else (2, 9)), **other}
    with pytest.raises(AdapterError, match=f"and nothing else, got {name}$"):
        check_only_pairs(adapter)


def test_parts_are_the_factors_of_one_kind() -> None:
    adapter = pairs_of(2)
    assert list(part_of(adapter, "lora_B")) == ["q_proj.lora_B.weight", "down_proj.lora_B.weight"]
    assert part_of(adapter, "lora_A") | part_of(adapter, "lora_B") == part_of(adapter, "all")


@pytest.mark.parametrize(
    ("name", "rank", "wrong"),
    [
        ("x.lora_A.weight", 5, r"rank must be in \[1, 4\], got 5"),
        ("x.lora_B.weight", 0, r"rank must be in \[1, 6\], got 0"),
        ("x.ia3_l", 1, "only LoRA can be tuned at a lower rank, got x.ia3_l"),
    ],
)
def test_a_rank_that_a_tensor_cannot_have_is_refused(name: str, rank: int, wrong: str) -> None:
    with pytest.raises(AdapterError, match=wrong):
        shape_at_rank(name, (4, 6), rank)


def test_shapes_at_a_lower_rank() -> None:
    assert shape_at_rank("x.lora_A.weight", (4, 9), 3) == (3, 9)
    assert shape_at_rank("x.lora_B.weight", (7, 4), 3) == (7, 3)


# --- the mean of products -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_mean_of_products_is_the_best_of_its_rank(name: str) -> None:
    states = [pairs_of(3, seed) for seed in range(3)]
    got = mean_of_products(states, WEIGHTS, pairs_of(3, 9))
    want = cut_by_dense_svd(mean_product(states, name), 3)
    np.testing.assert_allclose(product(got, name), want, rtol=1e-5, atol=1e-6)
    assert {n: (a.shape, a.dtype) for n, a in got.items()} == {
        n: (a.shape, a.dtype) for n, a in states[0].items()
    }


@pytest.mark.parametrize("name", SHAPES)
def test_mean_of_products_is_exact_where_its_rank_allows(name: str) -> None:
    states = [pairs_of(r, seed) for seed, r in enumerate([1, 2, 2])]
    got = mean_of_products(states, WEIGHTS, pairs_of(5, 9))
    np.testing.assert_allclose(product(got, name), mean_product(states, name), rtol=1e-4, atol=1e-6)


def pair_of_numbers(a: float, b: float) -> State:
    return {"x.lora_A.weight": np.full((1, 1), a), "x.lora_B.weight": np.full((1, 1), b)}


def test_sums_are_float64() -> None:
    # In float32, 1e8 + 1 is 1e8, and the one would be lost.
    states = [
        {n: a.astype(np.float32) for n, a in pair_of_numbers(1.0, b).items()}
        for b in (1e8, 1.0, -1e8)
    ]
    got = mean_of_products(states, [1 / 3] * 3, states[1])
    np.testing.assert_allclose(product(got, "x"), 1 / 3, rtol=1e-6)


def test_factors_are_balanced_and_fall_in_weight() -> None:
    state = truncated(pairs_of(4, dtype=np.float64), 4)
    values = np.linalg.svd(product(state, "q_proj"))[1][:4]
    a, b = state["q_proj.lora_A.weight"], state["q_proj.lora_B.weight"]
    np.testing.assert_allclose(a @ a.T, np.diag(values), atol=1e-12)
    np.testing.assert_allclose(b.T @ b, np.diag(values), atol=1e-12)


def test_signs_do_not_depend_on_how_the_product_was_factored() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 4, 4))
    turn = np.diag([1.0, -1.0, -1.0, 1.0])
    one, other = best_pair(a, b, a), best_pair(turn @ a, b @ turn, a)
    for got, want in zip(other, one, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    assert (one[0][np.arange(4), np.abs(one[0]).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_lower_rank_is_the_best_approximation(rank: int) -> None:
    adapter = pairs_of(4, dtype=np.float64)
    for name in SHAPES:
        want = cut_by_dense_svd(product(adapter, name), rank)
        np.testing.assert_allclose(product(truncated(adapter, rank), name), want, atol=1e-12)


def test_a_rank_above_the_layers_own_is_filled_up_with_zeros() -> None:
    adapter = pairs_of(10)  # q_proj is 7 x 9
    got = mean_of_products([adapter], [1.0], adapter)
    np.testing.assert_allclose(product(got, "q_proj"), product(adapter, "q_proj"), atol=1e-5)
    assert got["q_proj.lora_B.weight"].shape == (7, 10)
    assert not got["q_proj.lora_B.weight"][:, 7:].any()
    assert not got["q_proj.lora_A.weight"][9:].any()


def fresh(r: int) -> State:
    return {n: a * (".lora_A." in n) for n, a in pairs_of(r).items()}


def test_a_fresh_adapter_of_a_lower_rank_can_still_learn() -> None:
    # With zeros in both factors, neither would ever get a gradient.
    cut = truncated(fresh(4), 2)
    a = cut["q_proj.lora_A.weight"]
    np.testing.assert_allclose(a @ a.T, np.eye(2), atol=1e-6)
    assert not cut["q_proj.lora_B.weight"].any()
    span = np.vstack([a, fresh(4)["q_proj.lora_A.weight"]])
    assert np.linalg.matrix_rank(span, tol=1e-5) == 4  # directions of the adapter, not new ones


def test_directions_that_nobody_trained_can_still_learn() -> None:
    current = pairs_of(4, 9)
    got = mean_of_products([pairs_of(1), pairs_of(1)], [0.5, 0.5], current)
    a, b = got["q_proj.lora_A.weight"], got["q_proj.lora_B.weight"]
    np.testing.assert_allclose(product(got, "q_proj"), product(pairs_of(1), "q_proj"), atol=1e-5)
    assert not b[:, 1:].any()
    np.testing.assert_allclose(a[1:] @ a[1:].T, np.eye(3), atol=1e-6)
    known = [pairs_of(1)["q_proj.lora_A.weight"], current["q_proj.lora_A.weight"]]
    assert np.linalg.matrix_rank(np.vstack([a, *known]), tol=1e-5) == 5  # none is made up


def test_no_dense_product_is_formed() -> None:
    d = 400_000  # d x d float64 would be 1.3 TB
    rng = np.random.default_rng(0)
    state = {
        "x.lora_A.weight": rng.normal(size=(2, d)).astype(np.float32),
        "x.lora_B.weight": rng.normal(size=(d, 2)).astype(np.float32),
    }
    twice = {n: a * 2 for n, a in state.items()}
    got = mean_of_products([state, twice], [0.5, 0.5], state)
    row, column = got["x.lora_B.weight"][:3], got["x.lora_A.weight"][:, :3]
    want = 2.5 * state["x.lora_B.weight"][:3] @ state["x.lora_A.weight"][:, :3]
    np.testing.assert_allclose(row @ column, want, rtol=1e-4)
    assert product_error([state, twice], [0.5, 0.5]) == pytest.approx(0.25 / 2.5)


# --- the product error ----------------------------------------------------------------------------


def dense_error(states: list[State], weights: list[float]) -> float:
    errors, norms = [], []
    for name in SHAPES:
        mean_a, mean_b = (
            np.average([s[f"{name}.lora_{x}.weight"] for s in states], axis=0, weights=weights)
            for x in "AB"
        )
        mean = mean_product(states, name, weights)
        errors.append(np.sum((mean - mean_b @ mean_a) ** 2))
        norms.append(np.sum(mean**2))
    return float(np.sqrt(sum(errors) / sum(norms)))


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
def test_product_error_matches_dense_products(spread: float) -> None:
    start = pairs_of(3, 9, np.float64)
    states = [
        {n: start[n] + spread * a for n, a in pairs_of(3, seed, np.float64).items()}
        for seed in range(3)
    ]
    want = dense_error(states, WEIGHTS)
    assert product_error(states, WEIGHTS) == pytest.approx(
        want, rel=1e-3 if spread < 1e-5 else 1e-9
    )


def test_product_error_worked_by_hand() -> None:
    # products 1 * 2 and 3 * 6, mean 10; mean(B) mean(A) = 2 * 4 = 8
    one, other = pair_of_numbers(2.0, 1.0), pair_of_numbers(6.0, 3.0)
    assert product_error([one, other], [0.5, 0.5]) == pytest.approx(0.2)


def test_product_error_of_a_pair_is_over_those_who_have_it() -> None:
    # as above, and a second pair, of product 3, that only a third participant has
    one, other = pair_of_numbers(2.0, 1.0), pair_of_numbers(6.0, 3.0)
    third = {f"second.{name}": a for name, a in pair_of_numbers(3.0, 1.0).items()}
    error = product_error([one, other, third], [0.25, 0.25, 0.5])
    assert error == pytest.approx((4 / (100 + 9)) ** 0.5)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_product_error_vanishes_where_one_factor_is_the_same_for_all(part: str) -> None:
    same = {n: a for n, a in pairs_of(3, 9).items() if part in n}
    states = [pairs_of(3, seed) | same for seed in range(3)]
    error = product_error(states, WEIGHTS)
    assert error is not None
    assert error < 1e-15


def test_product_error_fills_lower_ranks_up_with_zeros() -> None:
    states = [pairs_of(r, r) for r in (1, 3, 2)]
    full = []
    for state in states:
        a_and_b = {}
        for name, matrix in state.items():
            missing = 3 - min(matrix.shape)
            rows, columns = (missing, 0) if ".lora_A." in name else (0, missing)
            a_and_b[name] = np.pad(matrix, ((0, rows), (0, columns)))
        full.append(a_and_b)
    assert product_error(states, WEIGHTS) == pytest.approx(dense_error(full, WEIGHTS))


def test_product_error_of_one_participant_is_zero() -> None:
    assert product_error([pairs_of(2)], [1.0]) == 0


def test_product_error_does_not_depend_on_the_order_of_tensors() -> None:
    states = [pairs_of(3, seed) for seed in range(3)]
    turned = [dict(reversed(s.items())) for s in states]
    assert product_error(states, WEIGHTS) == product_error(turned, WEIGHTS)


@pytest.mark.parametrize(
    "state",
    [{"layer.ia3_l": np.ones((4, 1))}, {}, fresh(2)],
    ids=["not LoRA", "nothing", "products of zero"],
)
def test_there_is_no_product_error_without_products(state: State) -> None:
    assert product_error([state, state], [0.5, 0.5]) is None
