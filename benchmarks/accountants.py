"""Epsilon of our accountant beside those of dp-accounting, which must be installed by itself.

Example:
    pip install dp-accounting==0.6.0
    python benchmarks/accountants.py
"""

from __future__ import annotations

import absl.logging
import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedpeat.federated.accounting import ORDERS, epsilon_of

DELTA = 1e-5
CASES = [(1.0, 0.02, 200), (0.8, 0.1, 80), (1.0, 1.0, 1), (4.0, 1.0, 10)]


def main() -> None:
    absl.logging.set_verbosity("error")
    print("| noise | chance | steps | ours | dp-accounting, Renyi | privacy loss distribution |")
    print("|--:|--:|--:|--:|--:|--:|")
    for noise, rate, steps in CASES:
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        renyi, loss = RdpAccountant(list(ORDERS)), PLDAccountant()
        for accountant in (renyi, loss):
            accountant.compose(event, steps)
        ours = epsilon_of({(noise, rate): steps}, DELTA)
        others = renyi.get_epsilon(DELTA), loss.get_epsilon(DELTA)
        print(f"| {noise} | {rate} | {steps} | {ours:.7f} | {others[0]:.7f} | {others[1]:.7f} |")


if __name__ == "__main__":
    main()
