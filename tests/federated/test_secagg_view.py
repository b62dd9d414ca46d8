"""What the server sees of one masked update looks like noise, and sums are those of Flower."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
import scipy.stats
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    factor_extract,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from fedpeat.core.wire import encode
from fedpeat.federated.secagg import crypto
from fedpeat.federated.secagg.ring import Quantiser, Ring
from fedpeat.federated.secagg.vector import vector_of
from secure_cohort import Cohort, cohort, counted_seeds, lost

ALPHA = 1e-3


@pytest.fixture(autouse=True)
def same_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the same masks each time, so that a test with an alpha has the same result."""
    monkeypatch.setattr(crypto, "new_seed", counted_seeds(0))
    monkeypatch.setattr(secrets, "token_hex", lambda length: "5" * (2 * length))


def seen_update(group: Cohort, name: str = "d00") -> np.ndarray:
    """Return what the server sees of one device's update."""
    group.aggregate()
    return next(p for kind, node, p in group.wire.seen if (kind, node) == ("train", name)).arrays[
        "masked"
    ]


def uniformity(packed: np.ndarray) -> list[float]:
    """Return p-values of a packed vector being uniform: its bytes, its numbers, and pairs of them.

    Chi-square over 256 values of each byte of a number by itself; Kolmogorov-Smirnov of the numbers
    over the ring; Spearman's correlation of neighbours.
    """
    ring = Ring(5)
    by_place = packed.reshape(-1, ring.num_bytes)
    numbers = ring.unpacked(packed).astype(np.float64) / 256.0**ring.num_bytes
    return [
        *(
            float(scipy.stats.chisquare(np.bincount(column, minlength=256)).pvalue)
            for column in by_place.T
        ),
        float(scipy.stats.kstest(numbers, "uniform").pvalue),
        float(scipy.stats.spearmanr(numbers[:-1], numbers[1:]).pvalue),
    ]


def test_one_masked_update_is_indistinguishable_from_uniform() -> None:
    p_values = uniformity(seen_update(cohort(4, size=20_000)))
    assert min(p_values) > ALPHA / len(p_values)


@pytest.mark.parametrize("kind", ["self_mask_key", "pair_mask_key"])
def test_either_mask_alone_hides_an_update(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = crypto.mask
    no_mask = b"no mask"
    monkeypatch.setattr(crypto, kind, lambda *_: no_mask)
    monkeypatch.setattr(
        crypto,
        "mask",
        lambda key, size, ring: (
            np.zeros(size, np.uint64) if key == no_mask else original(key, size, ring)
        ),
    )
    p_values = uniformity(seen_update(cohort(4, size=20_000)))
    assert min(p_values) > ALPHA / len(p_values)


def test_an_update_without_masks_is_told_from_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crypto, "mask", lambda key, size, ring: np.zeros(size, np.uint64))
    assert min(uniformity(seen_update(cohort(4, size=20_000)))) < 1e-100


def test_two_updates_look_alike_under_masks() -> None:
    views = [seen_update(cohort(4, size=20_000, seed=seed)) for seed in (0, 1)]
    numbers = [Ring(5).unpacked(view).astype(np.float64) for view in views]
    assert scipy.stats.ks_2samp(*numbers).pvalue > ALPHA


def test_what_goes_in_clear_does_not_depend_on_data() -> None:
    group = cohort(4)
    group.aggregate()
    other = cohort(4, seed=1)
    other.aggregate()
    for (kind, name, one), (_, _, two) in zip(group.wire.seen, other.wire.seen, strict=True):
        assert one.record.keys() == two.record.keys(), kind
        assert len(encode(one)) == len(encode(two)), (kind, name)
    records = [p.record for kind, _, p in group.wire.seen if kind == "train"]
    assert {key for record in records for key in record} == {
        "session",
        "server_round",
        "emulator",
        "seconds",
    }


# --- beside Flower ------------------------------------------------------------------------------


def test_sum_equals_that_of_flowers_quantisation_and_masks() -> None:
    group = cohort(4, size=400)
    sums, _, _ = group.aggregate()
    assert sums is not None
    names = sorted(group.wire.members)
    flower = flowers_mean(group, names)
    plain = group.plain_mean(names)
    for name, mean in sums.mean.items():
        # Flower rounds each weighted change to steps of 2^-22 of [-1, 1], up or down, and each
        # weight to 2^-22; its error of the mean is at most that of all devices over the weight.
        examples = sum(m.num_examples for m in group.wire.members.values()) / 1000
        flowers_bound = len(names) * (2 / 2**22 + 0.5 / 2**22) / examples
        assert np.abs(flower[name] - plain[name]).max() <= flowers_bound + 1e-6
        assert np.abs(flower[name] - mean).max() <= flowers_bound + 1.0 / 2**24 + 2e-6


def flowers_mean(group: Cohort, names: list[str]) -> dict[str, np.ndarray]:
    """Return the mean as Flower's parts make it, with a mask for each device and each pair."""
    target, modulus, most = 2**22, 2**32, 1000
    order = sorted(group.begun)
    shapes = [(1,), *((group.begun[name].shape) for name in order)]
    np.random.seed(0)  # noqa: NPY002 - Flower rounds with the global stream
    total = [np.zeros(shape, np.int64) for shape in shapes]
    masks = {name: secrets.token_bytes(32) for name in names}
    for place, name in enumerate(names):
        member = group.wire.members[name]
        changes = [member.update[n].astype(np.float64) - group.begun[n] for n in order]
        factor = round(member.num_examples / most * target)
        vector = factor_combine(
            factor, quantize(parameters_multiply(changes, factor / target), 1.0, target)
        )
        vector = parameters_addition(vector, pseudo_rand_gen(masks[name], modulus, shapes))
        for other in names:
            pair = b"".join(sorted((masks[name], masks[other])))
            stream = pseudo_rand_gen(pair, modulus, shapes)
            if other != name:
                step = parameters_addition if names.index(other) < place else parameters_subtraction
                vector = step(vector, stream)
        total = parameters_addition(total, parameters_mod(vector, modulus))
    for name in names:
        total = parameters_subtraction(total, pseudo_rand_gen(masks[name], modulus, shapes))
    factor_sum, sums = factor_extract(parameters_mod(total, modulus))
    whole = [
        array + (len(names) - 1) * -1.0 for array in dequantize(sums, 1.0, target)
    ]  # each device added the shift
    ratio = int(factor_sum) / target
    return {
        name: group.begun[name] + array / ratio for name, array in zip(order, whole, strict=True)
    }


def test_our_masked_vectors_are_added_and_opened_by_flowers_arithmetic() -> None:
    quantiser, begun = Quantiser(1.0, 16, 100, 3), {"a": np.zeros(50)}
    ring = quantiser.ring
    assert ring.num_bytes == 4  # what Flower's modulus is
    rng = np.random.default_rng(0)
    vectors = [
        vector_of(
            quantiser,
            begun,
            {"a": rng.uniform(-1, 1, 50)},
            num_examples=7,
            num_tokens=1,
            mean_loss=1.0,
        )
        for _ in range(3)
    ]
    keys = [crypto.self_mask_key(bytes([i]) * 16, "session", f"d{i}") for i in range(3)]
    masks = [crypto.mask(key, len(vectors[0]), ring) for key in keys]
    masked = [
        ring.unpacked(ring.packed(vector + mask)).astype(np.int64)
        for vector, mask in zip(vectors, masks, strict=True)
    ]
    total = [np.zeros(len(vectors[0]), np.int64)]
    for one in masked:
        total = parameters_addition(total, [one])
    for mask in masks:
        total = parameters_subtraction(total, [mask.astype(np.int64)])
    (opened,) = parameters_mod(total, 2**32)
    np.testing.assert_array_equal(
        ring.signed(opened.astype(np.uint64)), np.sum([v.view(np.int64) for v in vectors], axis=0)
    )


def test_flower_combines_our_shares_and_we_combine_flowers() -> None:
    secret = bytes(range(15))  # Flower pads to 16 bytes
    padded = secret + b"\x01"
    ours = crypto.split(padded, 3, 5)
    as_flowers = [(i + 1).to_bytes(4, "little") + share for i, share in enumerate(ours)]
    assert combine_shares(as_flowers[1:4]) == secret
    flowers = create_shares(secret, 3, 5)
    assert crypto.combine({i: share[4:] for i, share in enumerate(flowers) if i != 2}, 3) == padded


def test_masks_of_two_devices_cancel_and_differ_in_every_session() -> None:
    (one, one_public), (other, other_public) = (
        crypto.key_pair(seed * crypto.SEED_BYTES) for seed in (b"a", b"b")
    )
    secret = crypto.agreed(one, other_public)
    assert secret == crypto.agreed(other, one_public)
    key = crypto.pair_mask_key(secret, "session", "d0", "d1")
    assert key == crypto.pair_mask_key(secret, "session", "d1", "d0")
    assert key != crypto.pair_mask_key(secret, "session 2", "d0", "d1")
    assert key != crypto.pair_mask_key(secret, "session", "d0", "d2")


def test_dropped_devices_leave_no_mask_behind() -> None:
    group = cohort(5, size=400)
    group.wire.answered["train", "d02"] = lost
    sums, _, _ = group.aggregate()
    assert sums is not None
    left = [n for n in sorted(group.wire.members) if n != "d02"]
    for name, mean in group.plain_mean(left).items():
        np.testing.assert_allclose(sums.mean[name], mean, atol=1e-6)
