"""From a round's updates to the next adapter: averaged, with noise if promised, and stepped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedpeat.adapter.lora import part_of, product_error
from fedpeat.adapter.slices import Pieces, Slices, common
from fedpeat.core.errors import AggregationError
from fedpeat.core.records import RoundPlan
from fedpeat.federated.admission import Outcome, shares
from fedpeat.federated.aggregation import LoraAggregation, ServerOptimizer
from fedpeat.federated.privacy import Privacy
from fedpeat.federated.robust import Defence
from fedpeat.federated.shelf import Rung
from fedpeat.federated.state import FederationState

__all__ = ["Combined", "Combining"]

MAX_BARREN_ROUNDS = 3
_MOST_REASONS = 3


@dataclass(frozen=True)
class Combined:
    """What a round's updates come to.

    Attributes:
        state: Where the run stands after the round.
        weights: Share of each update in the average; none if nothing was averaged.
        product_error: What averaging the factors does wrong; None where it cannot be told.
        warnings: What is to be known of it.
    """

    state: FederationState
    weights: list[float] = field(default_factory=list)
    product_error: float | None = None
    warnings: Sequence[str] = ()


class Combining:
    """Makes the next adapter.

    Args:
        lora: What is tuned in a round, and how it is averaged.
        optimizer: What is done with the average.
        defence: What is done against updates that are as they may be, and poisoned.
        privacy: What is promised to examples and devices.
        server_weight_ratio: Share of the average for the server; None for its number of examples.
        min_clients: Fewest accepted updates with which a round counts.
    """

    def __init__(
        self,
        *,
        lora: LoraAggregation,
        optimizer: ServerOptimizer,
        defence: Defence,
        privacy: Privacy,
        server_weight_ratio: float | None,
        min_clients: int,
    ) -> None:
        self._lora = lora
        self._optimizer = optimizer
        self._defence = defence
        self._privacy = privacy
        self._server_weight_ratio = server_weight_ratio
        self._min_clients = min_clients

    def combine(
        self,
        state: FederationState,
        plan: RoundPlan,
        updates: Sequence[Outcome],
        rungs: Mapping[str, Rung],
        *,
        is_anybody_there: bool,
        complaints: Sequence[str],
    ) -> Combined:
        """Combine the accepted updates of a round.

        Args:
            state: Where the run stood before it.
            plan: What was planned.
            updates: What was accepted.
            rungs: Emulators by name.
            is_anybody_there: Whether any device answered to the roll call.
            complaints: Why updates are missing, for the message if they are too few.

        Raises:
            AggregationError: If too few updates were accepted for the third time in a row.
        """
        num_accepted = sum(update.num_devices for update in updates)
        is_private = self._privacy.client is not None and is_anybody_there  # even if none was drawn
        if is_private or num_accepted >= self._min_clients:
            return self._stepped(state, plan, updates, rungs, is_private=is_private)
        if is_anybody_there and not plan.server_steps and all(c.lost for c in plan.cohort):
            return Combined(replace(state, server_round=state.server_round + 1))  # as planned
        shortage = self._shortage(num_accepted, complaints)
        new_state = self._barren(state, updates, shortage)
        return Combined(new_state, warnings=(f"the adapter stays as it was: {shortage}",))

    def _stepped(
        self,
        state: FederationState,
        plan: RoundPlan,
        updates: Sequence[Outcome],
        rungs: Mapping[str, Rung],
        *,
        is_private: bool,
    ) -> Combined:
        """Average the updates, and step."""
        pieces = Pieces(state.adapter, [rung.slices for rung in rungs.values()])
        current = pieces.cut(state.adapter, {})
        tuned = [pieces.cut(u.arrays, _slices_of(u, rungs)) for u in updates]
        trusted = [u.result.role == "server" for u in updates]
        server_round = state.server_round + 1
        if is_private:
            assert self._privacy.client is not None
            rung = next(iter(rungs.values()))  # all have the same tensors, or there is but one
            part = part_of(rung.own(state.adapter), self._lora.tuned_part(server_round))
            held = pieces.cut(part, rung.slices)
            averaged = self._privacy.client.average(tuned, trusted, held, plan, server_round)
        else:
            trust = {name: rung.trust for name, rung in rungs.items()}
            weights = shares(self._defence.levelled(updates), self._server_weight_ratio, trust)
            averaged = self._defence.average(tuned, weights, trusted, current, self._lora)
        error = None
        if all(update.num_devices == 1 for update in updates):  # else who made what is not known
            error = _product_error(state, updates, averaged.weights, rungs)
        new, moments = self._optimizer.step(current, averaged.tensors, dict(state.moments))
        losses = _losses_after(state, updates)
        new_state = FederationState(server_round, pieces.join(new), moments, losses)
        return Combined(new_state, averaged.weights, error, averaged.warnings)

    def _shortage(self, num_accepted: int, complaints: Sequence[str]) -> str:
        text = "; ".join(complaints[:_MOST_REASONS]) or "nobody took part"
        if len(complaints) > _MOST_REASONS:
            text += f"; and {len(complaints) - _MOST_REASONS} more"
        return f"{num_accepted} updates accepted, {self._min_clients} wanted; {text}"

    def _barren(
        self, state: FederationState, updates: Sequence[Outcome], shortage: str
    ) -> FederationState:
        """Keep the adapter when too few updates came; give up when that goes on."""
        server_round, num_barren_rounds = state.server_round + 1, state.num_barren_rounds + 1
        if num_barren_rounds >= MAX_BARREN_ROUNDS:
            raise AggregationError(
                f"round {server_round}, the last of {num_barren_rounds} in a row without enough "
                f"updates: {shortage}"
            )
        return replace(
            state,
            server_round=server_round,
            last_losses=_losses_after(state, updates),
            num_barren_rounds=num_barren_rounds,
        )


def _product_error(
    state: FederationState,
    updates: Sequence[Outcome],
    weights: Sequence[float],
    rungs: Mapping[str, Rung],
) -> float | None:
    """Return what averaging the factors does wrong where all have them."""
    tuned = [_tuned_adapter(state, update, rungs) for update in updates]
    return product_error(common(tuned, [_slices_of(u, rungs) for u in updates]), weights)


def _slices_of(update: Outcome, rungs: Mapping[str, Rung]) -> Slices:
    """Return the entries of the tensors that a participant has in part."""
    rung = rungs.get(update.result.rung)
    return {} if rung is None else rung.slices


def _tuned_adapter(
    state: FederationState, update: Outcome, rungs: Mapping[str, Rung]
) -> dict[str, np.ndarray]:
    """Return the adapter of a participant's own blocks, with what the round froze."""
    rung = rungs.get(update.result.rung)
    adapter = state.adapter if rung is None else rung.own(state.adapter)
    return {**adapter, **update.arrays}


def _losses_after(state: FederationState, updates: Sequence[Outcome]) -> dict[str, float]:
    new = {
        u.result.client_id: u.mean_loss
        for u in updates
        if u.mean_loss is not None and u.num_devices == 1
    }
    return {**state.last_losses, **new}
