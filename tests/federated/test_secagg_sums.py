"""Secure aggregation adds up right, whoever drops out when, and says so when it cannot."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeat.core.errors import AggregationError, WireError
from fedpeat.federated.secagg.graph import enough_neighbours, neighbourhoods, threshold
from fedpeat.federated.secagg.ring import Quantiser, Ring
from fedpeat.federated.secagg.vector import NUM_EXTRAS, read_sums, vector_of
from secure_cohort import STEPS, Cohort, cohort, lost

ROUNDING = 1e-6  # of float32, for values up to 5


def assert_right(group: Cohort, survivors: list[str]) -> None:
    """Check a round against the plain mean of the devices whose updates came.

    Each change d is rounded to k steps with |k step - d| <= step / 2, and the mean of the devices
    is sum(n_i k_i) step / sum(n_i), so that it is off by at most step / 2 as well.
    """
    sums, outcomes, shortage = group.aggregate()
    assert shortage == ""
    assert sums is not None
    assert sorted(n for n, o in outcomes.items() if o.accepted) == survivors
    members = [group.wire.members[name] for name in survivors]
    bound = 1.0 / 2**24
    for name, mean in group.plain_mean(survivors).items():
        assert np.abs(sums.mean[name] - mean).max() <= bound + ROUNDING
    assert sums.num_examples == sum(m.num_examples for m in members)
    assert sums.num_tokens == sum(m.num_tokens for m in members)
    assert sums.mean_loss == pytest.approx(np.mean([m.mean_loss for m in members]), abs=2**-16)


# --- drop-outs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4, 10])
def test_the_sum_of_all_is_the_plain_sum(count: int) -> None:
    group = cohort(count)
    assert_right(group, sorted(group.wire.members))


@pytest.mark.parametrize("step", STEPS)
def test_two_in_five_may_be_lost_at_any_step(step: str) -> None:
    group = cohort(5, seed=STEPS.index(step))
    for name in ("d01", "d04"):
        group.wire.answered[step, name] = lost
    came = step in {"secagg_survivors", "secagg_unmask"}
    assert_right(group, [f"d0{i}" for i in range(5) if came or i not in {1, 4}])


@pytest.mark.parametrize("seed", range(8))
def test_up_to_two_in_five_may_be_lost_each_at_a_step_of_its_own(seed: int) -> None:
    group = cohort(10, seed=seed)
    rng = np.random.default_rng(seed)
    gone = rng.permutation(sorted(group.wire.members))[: int(rng.integers(0, 5))]
    steps = {str(name): STEPS[rng.integers(len(STEPS))] for name in gone}
    for name, step in steps.items():
        group.wire.answered[step, name] = lost
    late = {"secagg_survivors", "secagg_unmask"}
    assert_right(
        group, [n for n in sorted(group.wire.members) if steps.get(n, "none") in {*late, "none"}]
    )


@pytest.mark.parametrize("step", STEPS)
def test_a_round_with_fewer_than_the_threshold_has_no_sum_and_says_why(step: str) -> None:
    group = cohort(5)
    for name in ("d00", "d01", "d04"):
        group.wire.answered[step, name] = lost
    sums, _, shortage = group.aggregate()
    assert sums is None
    assert shortage.startswith("too few devices")
    assert "3 wanted" in shortage
    assert "\n" not in shortage


def test_neighbours_in_a_large_cohort_are_few_and_the_sum_is_right() -> None:
    group = cohort(16, num_neighbours=6)
    group.wire.answered["train", "d03"] = lost
    group.wire.answered["secagg_unmask", "d09"] = lost
    assert_right(group, [n for n in sorted(group.wire.members) if n != "d03"])
    shared = [p for kind, _, p in group.wire.seen if kind == "secagg_shares"]
    assert {len(p.record["shares"]) for p in shared} == {6}


def test_a_round_is_summed_anew_with_other_secrets() -> None:
    group = cohort(3)
    first, _, _ = group.aggregate(server_round=1)
    again, _, _ = group.aggregate(server_round=2)
    assert first is not None
    assert again is not None
    for name, array in first.mean.items():
        assert array.tobytes() == again.mean[name].tobytes()  # exact in the ring
    vectors = [p.arrays["masked"] for kind, _, p in group.wire.seen if kind == "train"]
    assert len({v.tobytes() for v in vectors}) == 6


# --- rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "examples", "devices", "num_bytes"),
    [
        (24, 1000, 4, 5),  # 2^23 * 1000 * 4 < 2^35, and a sign: 36 bits
        (24, 10_000_000, 8, 7),  # 2^23 * 10^7 * 8 < 2^50, and a sign: 51 bits
        (8, 1, 3, 4),  # never less than room for losses and counts
        (32, 2**24, 2**7, 8),  # 2^31 * 2^24 * 2^7 = 2^62: 63 bits, and a sign
    ],
)
def test_ring_is_as_small_as_holds_the_sum(
    bits: int, examples: int, devices: int, num_bytes: int
) -> None:
    assert Quantiser(1.0, bits, examples, devices).ring.num_bytes == num_bytes


def test_what_no_ring_holds_is_refused_with_what_to_lower() -> None:
    with pytest.raises(AggregationError, match="must fit into 64 bits .* got 65; lower federated"):
        Quantiser(1.0, 32, 2**24, 2**8).ring  # noqa: B018


@pytest.mark.parametrize("num_bytes", range(4, 9))
def test_numbers_of_a_ring_survive_the_way_and_wrap_around(num_bytes: int) -> None:
    ring = Ring(num_bytes)
    half = 256**num_bytes // 2
    values = np.array([0, 1, -1, half - 1, -half], np.int64)
    packed = ring.packed(values.view(np.uint64))
    assert packed.shape == (5 * num_bytes,)
    np.testing.assert_array_equal(ring.signed(ring.unpacked(packed)), values)
    over = ring.unpacked(packed) + np.uint64(1)
    assert ring.signed(over)[3] == -half


def test_the_largest_changes_of_a_full_cohort_do_not_wrap_around() -> None:
    quantiser = Quantiser(0.5, 24, 1000, 4)
    begun = {"a": np.zeros(1)}
    vectors = [
        vector_of(
            quantiser, begun, {"a": np.full(1, 9.0)}, num_examples=1000, num_tokens=1, mean_loss=1e9
        )
        for _ in range(4)
    ]
    total = np.sum(np.stack(vectors), axis=0, dtype=np.uint64)
    assert isinstance(total, np.ndarray)
    sums = read_sums(quantiser, total, begun, 4)
    assert sums.mean["a"] == pytest.approx([0.5])  # clipped to the range
    assert sums.num_clipped == 4
    assert sums.num_examples == 4000
    assert sums.mean_loss > 1000


def test_changes_are_rounded_to_the_nearest_step_before_they_are_weighed() -> None:
    quantiser = Quantiser(1.0, 3, 10, 3)  # steps of a quarter
    values, num_clipped = quantiser.weighted(np.array([0.13, 0.12, -0.3, 0.9, 7.0]), 3)
    assert values.tolist() == [3, 0, -3, 12, 12]
    assert num_clipped == 1


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        (0, 2**23 * 30 + 1, "the devices' sum is out of range in 1 of 2 values"),
        (1, -(2**23) * 30 - 1, "the devices' sum is out of range in 1 of 2 values"),
        (2, 1, "the sum of 2 devices' examples must be in [2, 200], got 1"),
        (2, 201, "the sum of 2 devices' examples must be in [2, 200], got 201"),
        (3, -1, "the devices' sum is out of range in 0 of 2 values"),
    ],
)
def test_a_sum_that_no_devices_can_have_is_refused(place: int, value: int, why: str) -> None:
    quantiser, total = Quantiser(1.0, 24, 100, 3), np.array([0, 0, 30, 0, 0, 0], np.int64)
    total[place] = value
    with pytest.raises(WireError) as caught:
        read_sums(quantiser, total.view(np.uint64), {"a": np.zeros(2)}, 2)
    assert str(caught.value) == why


def test_a_device_scales_its_change_to_the_norm_it_may_have() -> None:
    begun = {"a": np.zeros(2), "b": np.zeros(1)}
    update = {"a": np.array([0.0, 0.3]), "b": np.array([0.4])}  # norm 0.5
    quantiser = Quantiser(1.0, 24, 10, 3)
    bounded = vector_of(
        quantiser, begun, update, num_examples=2, num_tokens=1, mean_loss=0, clip_norm=0.25
    )
    steps = quantiser.ring.signed(bounded)[:-NUM_EXTRAS] * quantiser.step / 2
    np.testing.assert_allclose(steps, [0.0, 0.15, 0.2], atol=quantiser.step)


@pytest.mark.parametrize(
    ("update", "num_examples", "loss", "why"),
    [
        (np.nan, 1, 0.0, "the update has values that are not finite"),
        (np.inf, 1, 0.0, "the update has values that are not finite"),
        (0.0, 0, 0.0, "examples must be in [1, 10], got 0"),
        (0.0, 11, 0.0, "examples must be in [1, 10], got 11"),
        (0.0, 1, np.nan, "the loss must be finite, got nan"),
    ],
)
def test_a_device_masks_nothing_that_would_spoil_the_sum(
    update: float, num_examples: int, loss: float, why: str
) -> None:
    quantiser, begun = Quantiser(1.0, 24, 10, 3), {"a": np.zeros(1)}
    with pytest.raises(WireError) as caught:
        vector_of(
            quantiser,
            begun,
            {"a": np.full(1, update)},
            num_examples=num_examples,
            num_tokens=1,
            mean_loss=loss,
        )
    assert str(caught.value) == why


# --- neighbours ---------------------------------------------------------------------------------


def test_neighbours_are_mutual_and_as_many_as_asked_for() -> None:
    names = [f"d{i:02}" for i in range(30)]
    near = neighbourhoods(names, 8, np.random.default_rng(0))
    assert sorted(near) == names
    for name, members in near.items():
        assert len(members) == len(set(members)) == 9
        assert members == tuple(sorted(members))
        assert all(name in near[other] for other in members)


def test_a_small_cohort_is_one_neighbourhood() -> None:
    near = neighbourhoods(["b", "a", "c"], 2, np.random.default_rng(0))
    assert near == dict.fromkeys("abc", ("a", "b", "c"))


def test_odd_numbers_of_neighbours_are_refused() -> None:
    with pytest.raises(AggregationError, match="must be an even number, at least 2, got 3"):
        neighbourhoods(list("abcdef"), 3, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("ratio", "size", "needed"),
    [(0.6, 5, 3), (0.6, 10, 6), (0.56, 25, 14), (0.6, 3, 2), (1.0, 4, 4), (0.51, 2, 2)],
)
def test_threshold_is_the_share_rounded_up_and_at_least_two(
    ratio: float, size: int, needed: int
) -> None:
    assert threshold(ratio, size) == needed


def test_neighbours_grow_much_slower_than_the_cohort() -> None:
    assert enough_neighbours(100, 0.6) == 99  # all others
    few, many = enough_neighbours(1000, 0.6), enough_neighbours(4000, 0.6)
    assert 50 < few < many < 2 * few < 1000
