"""What secure aggregation costs in bytes and seconds, beside updates in clear in the same process.

    python benchmarks/secure_aggregation.py              # cohorts of 4, 16 and 64
    python benchmarks/secure_aggregation.py --check 200  # sums of 200 random rounds against NumPy

Nothing is trained: an update is noise. Seconds are those of the process, so that other work on the
machine counts less; a device's are those of all devices over their number. With --check each of
some rounds loses 0 to 40 % of 5 to 12 devices, each of them after a random step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fedpeat.core.wire import Payload, decode, encode
from fedpeat.federated.aggregation import weighted_average
from fedpeat.federated.exchange import Exchange
from fedpeat.federated.in_process import InProcessTransport
from fedpeat.federated.secagg.device import SecureDevice
from fedpeat.federated.secagg.identity import Authority, simulated
from fedpeat.federated.secagg.round import SecureAggregation
from fedpeat.federated.secagg.terms import SECURE_KEY

STEPS = ("secagg_keys", "secagg_shares", "train", "secagg_survivors", "secagg_unmask")
MAX_EXAMPLES = 10_000
NUM_BITS, CLIP_RANGE = 24, 1.0
State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Cost:
    """What a round cost.

    Bytes are those of a device on average [byte], seconds of the process [s]; ``error`` is the
    largest distance to the mean of those who were in the sum, -1 if there was none.
    """

    bytes_down: float
    bytes_up: float
    device_seconds: float
    server_seconds: float
    error: float


@dataclass
class Device:
    """A device whose update is noise."""

    update: State
    num_examples: int
    secure: SecureDevice | None = None
    lost_after: str = ""
    seconds: float = 0.0

    def answer(self, kind: str, content: bytes) -> bytes:
        start = time.process_time()
        answer = encode(self._answer(kind, decode(content)))
        self.seconds += time.process_time() - start
        if kind == self.lost_after:
            raise ConnectionError("lost")
        return answer

    def _answer(self, kind: str, payload: Payload) -> Payload:
        if self.secure is None:
            return Payload(self.update, {"num_examples": self.num_examples})
        if kind != "train":
            return self.secure.kinds[kind](payload)
        self.secure.begin(payload.record[SECURE_KEY], payload.arrays, 1, "e", "w")
        masked = self.secure.masked(payload.arrays, self.update, self.num_examples, 1, 1.0)
        return Payload(masked.arrays, {**masked.record, "seconds": "00000.000001"})


def plain(begun: State, devices: Mapping[str, Device]) -> Cost:
    """Return the cost of a round in clear."""

    def average(exchange: Exchange) -> State:
        task = encode(Payload(begun))
        replies = exchange.collect("train", dict.fromkeys(devices, task))
        updates = [decode(reply.content or b"") for reply in replies.values()]
        return weighted_average(
            [u.arrays for u in updates], [u.record["num_examples"] for u in updates]
        )

    return measured(devices, average, list(devices))


def secure(
    begun: State, devices: Mapping[str, Device], authority: bytes, neighbours: int | None
) -> Cost:
    """Return the cost of a round in which all mask their updates."""
    server = SecureAggregation(
        Authority(authority), 0.6, neighbours, 3, CLIP_RANGE, NUM_BITS, MAX_EXAMPLES
    )
    in_sum = [n for n, d in devices.items() if d.lost_after not in STEPS[:3]]

    def average(exchange: Exchange) -> State:
        opened = server.begin(
            list(devices),
            server_round=1,
            adapter=begun,
            work="w",
            emulators=["e"],
            exchange=exchange,
        )
        tasks = {n: encode(Payload(begun, {SECURE_KEY: part})) for n, part in opened.parts.items()}
        expected: dict[str, dict[str, object]] = {name: {} for name in devices}
        sums, _ = opened.finish(exchange.collect("train", tasks), begun, expected)
        return {} if sums is None else sums.mean

    return measured(devices, average, in_sum)


def measured(
    devices: Mapping[str, Device], average: Callable[[Exchange], State], in_sum: list[str]
) -> Cost:
    exchange = Exchange(InProcessTransport({n: d.answer for n, d in devices.items()}), 1, None)
    start = time.process_time()
    mean = average(exchange)
    whole = time.process_time() - start
    on_devices = sum(device.seconds for device in devices.values())
    wanted = weighted_average(
        [{n: a.astype(np.float64) for n, a in devices[name].update.items()} for name in in_sum],
        [devices[name].num_examples for name in in_sum],
    )
    return Cost(
        sum(sent.bytes_down for sent in exchange.traffic.values()) / len(devices),
        sum(sent.bytes_up for sent in exchange.traffic.values()) / len(devices),
        on_devices / len(devices),
        whole - on_devices,
        max((float(np.abs(mean[n] - wanted[n]).max()) for n in mean), default=-1.0),
    )


def cohort(
    count: int, size: int, seed: int, *, masks: bool
) -> tuple[State, dict[str, Device], bytes]:
    """Return an adapter, devices that changed it at random, and their authority."""
    rng = np.random.default_rng(seed)
    begun = {"adapter": rng.normal(size=size).astype(np.float32)}
    names = [f"device-{i:03}" for i in range(count)]
    identities, authority = simulated(names)
    devices = {
        name: Device(
            {"adapter": (begun["adapter"] + rng.uniform(-0.1, 0.1, size)).astype(np.float32)},
            int(rng.integers(1, MAX_EXAMPLES)),
            SecureDevice(identities[name], 3) if masks else None,
        )
        for name in names
    }
    return begun, devices, authority


def median(costs: list[Cost]) -> Cost:
    return Cost(*(statistics.median(getattr(c, key) for c in costs) for key in vars(costs[0])))


def rows(sizes: list[int], counts: list[int], repeats: int) -> Iterator[str]:
    """Yield the lines of a table."""
    heads = ["devices", "values", "neighbours", "lost"]
    heads += ["down, kB", "up, kB", "device, s", "server, s", "off by"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'--:|' * len(heads)}"
    for size in sizes:
        for count in counts:
            yield _row(count, size, "in clear", 0, [_plain(count, size, s) for s in range(repeats)])
            cases: list[tuple[int | None, int]] = [(None, 0), (None, max(1, count // 5))]
            if count > 20:
                cases.append((20, 0))
            for near, num_lost in cases:
                costs = [_secure(count, size, s, near, num_lost) for s in range(repeats)]
                yield _row(count, size, f"{near or count - 1}", num_lost, costs)


def _plain(count: int, size: int, seed: int) -> Cost:
    begun, devices, _ = cohort(count, size, seed, masks=False)
    return plain(begun, devices)


def _secure(count: int, size: int, seed: int, near: int | None, num_lost: int) -> Cost:
    begun, devices, authority = cohort(count, size, seed, masks=True)
    for name in list(devices)[:num_lost]:
        devices[name].lost_after = "train"
    return secure(begun, devices, authority, near)


def _row(count: int, size: int, near: str, num_lost: int, costs: list[Cost]) -> str:
    cost = median(costs)
    return (
        f"| {count} | {size:,} | {near} | {num_lost} | {cost.bytes_down / 1e3:,.1f} "
        f"| {cost.bytes_up / 1e3:,.1f} | {cost.device_seconds:.3f} | {cost.server_seconds:.3f} "
        f"| {cost.error:.1e} |"
    )


def check(num_rounds: int) -> None:
    """Sum up so many random rounds, and say how far off the worst one was."""
    worst, num_lost = 0.0, 0
    for seed in range(num_rounds):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(5, 13))
        begun, devices, authority = cohort(count, 200, seed, masks=True)
        gone = rng.permutation(sorted(devices))[: int(rng.integers(0, int(0.4 * count) + 1))]
        for name in gone:
            devices[str(name)].lost_after = STEPS[rng.integers(len(STEPS))]
        cost = secure(begun, devices, authority, None)
        assert cost.error >= 0, f"round {seed} had no sum"
        worst, num_lost = max(worst, cost.error), num_lost + len(gone)
    half_step = CLIP_RANGE / 2**NUM_BITS
    print(f"{num_rounds} rounds, {num_lost} devices lost: off by at most {worst:.1e}")
    print(
        f"half a step is {half_step:.1e}, and float32 rounds the mean of values up to 4 by 2.4e-07"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--values", type=int, nargs="+", default=[50_000, 500_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", type=int, metavar="ROUNDS")
    args = parser.parse_args()
    if args.check:
        check(args.check)
        return
    for line in rows(args.values, args.devices, args.repeats):
        print(line, flush=True)


if __name__ == "__main__":
    main()
