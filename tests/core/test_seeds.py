"""Seeds belong to a purpose, not to what was drawn before."""

from __future__ import annotations

import random

import numpy as np

from fedpeat.core.seeds import derive_seed, generator


def test_seed_is_the_first_63_bits_of_the_sha256_of_its_purpose() -> None:
    # printf '0\x1fbatches\x1fclient-3\x1f7' | sha256sum: d773c6a78897fd6c...
    assert derive_seed(0, "batches", "client-3", 7) == 0xD773C6A78897FD6C >> 1


def test_seeds_of_different_purposes_differ() -> None:
    purposes = [("batches", f"client-{c}", r) for c in range(20) for r in range(20)]
    seeds = {derive_seed(seed, *purpose) for seed in (0, 1, -1) for purpose in purposes}
    assert len(seeds) == 3 * 400


def test_purposes_that_read_alike_when_joined_have_seeds_of_their_own() -> None:
    assert len({derive_seed(0, "a", "bc"), derive_seed(0, "ab", "c"), derive_seed(0, "abc")}) == 3
    assert derive_seed(0, 1, "a") != derive_seed(0, "", "1a")


def test_seed_fits_every_generator_that_takes_63_bits() -> None:
    assert all(0 <= derive_seed(0, i) < 2**63 for i in range(1000))


def test_stream_does_not_depend_on_what_was_drawn_before() -> None:
    first = generator(3, "partition").random(5)
    np.random.seed(1)  # noqa: NPY002 - the global generator is what must not matter
    random.seed(1)
    generator(3, "other").random(100)
    np.testing.assert_array_equal(generator(3, "partition").random(5), first)


def states() -> tuple[str, str]:
    return repr(np.random.get_state(legacy=False)), repr(random.getstate())  # noqa: NPY002


def test_drawing_leaves_the_global_generators_alone() -> None:
    before = states()
    generator(3, "partition").random(5)
    assert states() == before
