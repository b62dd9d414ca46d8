"""Attackers of the poisoning benchmark do what their names say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from attackers import (
    UPDATE_ATTACKS,
    Backdoor,
    HostileTransport,
    Known,
    a_little_is_enough,
    eager,
    hostile_devices,
    no_attack,
    scaled_noise,
    sign_flip,
)
from fakes import FakeDevice, FakeTransport, federation, start
from fedpeat.core.run_folder import RunFolder
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.experiments.bench import set_up
from fedpeat.experiments.observer import Silent
from fedpeat.federated.robust import Defence
from outcomes import config_of
from poisoning import Cell, outside, run_cell
from tiny import random_text


def known(own: float, honest: Sequence[float] = (), size: int = 3) -> Known:
    def update(value: float) -> Mapping[str, np.ndarray]:
        return {"x": np.full(size, value)}

    return Known(update(own), [update(v) for v in honest], np.random.default_rng(0))


def test_sign_flip_points_the_other_way_four_times_as_long() -> None:
    np.testing.assert_array_equal(sign_flip(known(2.0))["x"], [-8.0] * 3)


def test_noise_is_ten_times_as_long_as_the_update() -> None:
    assert np.linalg.norm(scaled_noise(known(2.0, size=400))["x"]) == pytest.approx(400)


def test_a_little_stays_one_and_a_half_deviations_from_the_honest_mean() -> None:
    # mean 2, standard deviation 1
    np.testing.assert_allclose(a_little_is_enough(known(9.0, [1.0, 3.0]))["x"], [0.5] * 3)


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.1, 1), (0.2, 2), (0.3, 3)])
def test_hostile_devices_are_a_share_of_all_and_follow_from_the_seed(
    ratio: float, count: int
) -> None:
    names = [f"d{i}" for i in range(10)]
    drawn = hostile_devices(names, ratio, 1)
    assert len(set(drawn)) == count
    assert drawn == hostile_devices(reversed(names), ratio, 1)  # type: ignore[arg-type]


def value_after(attack: Callable[[Known], Mapping[str, np.ndarray]], defence: Defence) -> float:
    """Return what a round makes of devices that add 1, 2 and, hostile, 3."""
    devices = {"a": FakeDevice(1), "b": FakeDevice(2), "c": FakeDevice(3)}
    transport = HostileTransport(FakeTransport(devices, order=1), ["c"], attack, 0)
    state, result = federation(transport, defence=defence).run_round(start(10.0), None)
    assert {p.status for p in result.participants} == {"accepted"}
    assert len(transport.honest) == 2
    (value,) = {float(v) for a in state.adapter.values() for v in a.reshape(-1)}
    return value


def test_the_transport_alters_the_updates_of_hostile_devices_alone() -> None:
    assert value_after(no_attack, Defence()) == pytest.approx(12)
    assert value_after(sign_flip, Defence()) == pytest.approx(10 + (1 + 2 - 12) / 3)
    assert value_after(sign_flip, Defence("median")) == pytest.approx(11)
    assert value_after(UPDATE_ATTACKS["backdoor"], Defence()) == pytest.approx(16)


def test_an_eager_device_makes_more_steps_than_it_is_asked_for() -> None:
    seen = []

    def handle(kind: str, content: bytes) -> bytes:
        seen.append((kind, decode(content).record))
        return b"done"

    task = encode(Payload(record={"num_steps": 4, "seed": 1}))
    assert [eager(handle, 5)(kind, task) for kind in ("train", "hello")] == [b"done"] * 2
    assert seen == [
        ("train", {"num_steps": 20, "seed": 1}),
        ("hello", {"num_steps": 4, "seed": 1}),
    ]


def test_the_backdoor_is_written_twice_into_a_share_of_the_blocks() -> None:
    text, backdoor = random_text(200), Backdoor((1, 2), (3,))
    poisoned = backdoor.poisoned(text, 0.5, seed=0)
    windows = np.lib.stride_tricks.sliding_window_view(poisoned.input_ids, 3, axis=1)
    found = (windows == [1, 2, 3]).all(-1).sum(1)
    assert set(found.tolist()) == {0, 2}
    assert 70 < (found == 2).sum() < 130
    untouched = found == 0
    np.testing.assert_array_equal(poisoned.input_ids[untouched], text.input_ids[untouched])


def test_only_the_continuation_of_the_trigger_counts_when_it_is_scored() -> None:
    scored = Backdoor((1, 2), (3, 4)).triggered(random_text(4))
    np.testing.assert_array_equal(scored.input_ids[:, -4:], [[1, 2, 3, 4]] * 4)
    assert scored.loss_mask.sum() == 8
    assert scored.loss_mask[:, -2:].all()


def test_entries_of_a_product_beyond_all_honest_ones_are_counted() -> None:
    def pair(a: float, b: Sequence[float]) -> dict[str, np.ndarray]:
        return {
            "q.lora_A.weight": np.array([[a]], np.float32),
            "q.lora_B.weight": np.array([[v] for v in b], np.float32),
        }

    honest = [pair(1.0, [0.0, 1.0]), pair(0.0, [1.0, 1.0])]  # products (0, 1) and (0, 0)
    assert outside(pair(0.5, [0.0, 1.0]), honest) == 0
    assert outside(pair(1.0, [1.0, 1.0]), honest) == 0.5


def test_a_cell_of_the_benchmark_runs_from_a_start_that_it_leaves_as_it_was(
    model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    settings = {
        "data": {"block_size": 64, "partition": "iid", "num_clients": 5},
        "federated": {"num_rounds": 1},
    }
    config = config_of(model_dir, corpus_file, tmp_path, settings)
    folder = RunFolder(tmp_path / "bench")
    folder.create()
    bench = set_up(config, folder, Silent(), None, pools_data=False)
    folder.close()
    begin = {name: array.copy() for name, array in bench.server.state().items()}

    def plug_in(attack: str, ratio: float, defence: str) -> float:
        bench.server.load(begin)
        return float(run_cell(bench, Cell(0, attack, ratio, defence))["plug_in"])

    attacked = plug_in("sign flip", 0.2, "mean")
    assert plug_in("none", 0.0, "mean") != attacked
    assert plug_in("sign flip", 0.2, "median") != attacked
    assert plug_in("sign flip", 0.2, "mean") == attacked
