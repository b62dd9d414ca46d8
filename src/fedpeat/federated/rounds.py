"""The round loop, written once, against a transport that may be this process or a fleet.

One round: ask who is there and what they hold, plan, send emulators to those that lack theirs, send
the adapter, train the server's own part while the devices work, collect until the deadline, screen,
average, step.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedpeat.adapter.lora import Part, State, part_of
from fedpeat.core.errors import AggregationError, WireError
from fedpeat.core.records import (
    ClientPlan,
    ClientState,
    Controller,
    Reply,
    RoundObservation,
    RoundPlan,
    RoundResult,
    Transport,
)
from fedpeat.core.seeds import derive_seed
from fedpeat.core.wire import Payload, decode
from fedpeat.federated.admission import SERVER_ID, Outcome, admit, judge, with_traffic
from fedpeat.federated.aggregation import LoraAggregation, ServerOptimizer, update_norm
from fedpeat.federated.codecs import UpdateCodec
from fedpeat.federated.combining import Combining
from fedpeat.federated.exchange import Exchange
from fedpeat.federated.participant import train_message
from fedpeat.federated.privacy import Privacy, Steps
from fedpeat.federated.reception import Reception
from fedpeat.federated.robust import Defence
from fedpeat.federated.roll_call import RollCall
from fedpeat.federated.screening import (
    MAX_ANSWER_BYTES,
    Limits,
    longest_update,
    shown,
)
from fedpeat.federated.secagg.joint import JointRound, Trained, trained_apart
from fedpeat.federated.secagg.seam import SecureAggregator
from fedpeat.federated.shelf import Rung, hashes_of
from fedpeat.federated.state import FederationState
from fedpeat.tuning.local import LocalSettings

__all__ = [
    "SERVER_ID",
    "Federation",
    "FederationState",
    "Realign",
    "ServerTraining",
    "peak_rss_bytes",
]

Realign = Callable[[State, int], tuple[Mapping[str, Rung], Mapping[str, int]]]
"""Aligns the emulators anew: (adapter, coming round) -> all rungs, and the bytes of each that are
new."""
ServerTraining = Callable[[State, Part, int, int, int], Payload]
"""Trains the server's own part: (adapter, tuned, num_steps, first_step, seed) -> a reply of its
own."""


class Federation:
    """Everything that stays the same from round to round.

    Args:
        transport: How devices are reached.
        controller: Who plans the rounds.
        rungs: Emulators by name. The attribute of this name may be replaced between rounds.
        lora: What is tuned in a round, and how it is averaged.
        optimizer: What is done with the average.
        limits: What an update may be.
        defence: What is done against updates that are as they may be, and poisoned.
        secure: Aggregates devices' updates so that their sum alone is seen; None for in clear.
        privacy: What is promised to examples and devices.
        settings: How participants train.
        codec: How devices send their updates.
        server_training: The server's own part; None if it takes none.
        realign: Aligns emulators anew when a plan asks for it; None if that cannot be.
        reception: How devices on other machines are received; None if all are in this process.
        server_weight_ratio: Share of the average for the server; None for its number of examples.
        min_clients: Fewest accepted updates with which a round counts.
        deadline_seconds: Time for a round's replies [s]; None for no limit.
        quorum_ratio: Share of a round's devices whose updates end the round.
        num_rounds: Rounds of the run.
        seed: Seed of the run.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        controller: Controller,
        rungs: Mapping[str, Rung],
        lora: LoraAggregation,
        optimizer: ServerOptimizer,
        limits: Limits,
        defence: Defence | None = None,
        secure: SecureAggregator | None = None,
        privacy: Privacy | None = None,
        settings: LocalSettings,
        codec: UpdateCodec | None = None,
        server_training: ServerTraining | None,
        realign: Realign | None = None,
        reception: Reception | None = None,
        server_weight_ratio: float | None,
        min_clients: int,
        deadline_seconds: float | None,
        quorum_ratio: float = 1.0,
        num_rounds: int,
        seed: int,
    ) -> None:
        self._transport = transport
        self._controller = controller
        self.rungs = rungs
        self._lora = lora
        self._limits = limits
        self._defence = defence or Defence()
        self._secure = secure
        self._privacy = privacy or Privacy()
        self._settings = settings
        self._codec = codec or UpdateCodec()
        self._server_training = server_training
        self._realign = realign
        self._reception = reception
        self._deadline_seconds = deadline_seconds
        self._quorum_ratio = quorum_ratio
        self._num_rounds = num_rounds
        self._seed = seed
        self._roll_call = RollCall(
            max_examples=limits.max_examples,
            defence=self._defence,
            reception=reception,
            is_secure=secure is not None,
            tells_losses=self._privacy.client is None,
        )
        self._combining = Combining(
            lora=lora,
            optimizer=optimizer,
            defence=self._defence,
            privacy=self._privacy,
            server_weight_ratio=server_weight_ratio,
            min_clients=min_clients,
        )

    def run_round(
        self, state: FederationState, loss: float | None
    ) -> tuple[FederationState, RoundResult]:
        """Run one round.

        Args:
            state: Where the run stands.
            loss: Last known held-out loss of the plug-in, for the controller [nat].

        Raises:
            AggregationError: If too few updates were accepted for the third time in a row, the
                transport fails, or the plan names what there is not.
        """
        start = time.perf_counter()
        server_round = state.server_round + 1
        exchange = Exchange(self._transport, server_round, self._deadline_seconds)
        lasting = {
            name: self._lora.lasting_parts(rung.own(state.adapter))
            for name, rung in self.rungs.items()
        }
        clients, warnings = self._roll_call.ask(state, self.rungs, lasting, exchange)
        observed = RoundObservation(server_round, self._num_rounds, tuple(clients.values()), loss)
        plan = self._controller.plan(observed)
        self._check_plan(server_round, plan, clients)
        refresh_bytes = self._align(state, clients) if plan.realigns else {}
        trained = self._train(state, plan, clients, lasting, exchange)
        updates = self._defence.clipped(trained.updates)
        results = {
            o.result.client_id: o.result
            for o in [*trained.outcomes, *updates]
            if o.num_devices == 1
        }
        updates, left_out = self._defence.enough(updates)
        num_rejections, set_aside = self._defence.counted(
            state.num_rejections, list(results.values())
        )
        warnings = [*warnings, *trained.warnings, *left_out, *set_aside]
        complaints = [f"{r.client_id} {r.status}: {r.reason}" for r in results.values() if r.reason]
        combined = self._combining.combine(
            state,
            plan,
            updates,
            self.rungs,
            is_anybody_there=bool(clients),
            complaints=[*complaints, *warnings],
        )
        new_state = replace(
            combined.state,
            num_rejections=num_rejections,
            private_steps=self._private_steps(state, plan, clients),
        )
        share_of = dict(zip((u.result.client_id for u in updates), combined.weights, strict=False))
        participants = tuple(
            replace(
                result,
                weight=share_of.get(client_id, 0.0),
                epsilon=self._epsilon_of(client_id, new_state),
            )
            for client_id, result in results.items()
        )
        bytes_up = sum(sent.bytes_up for sent in exchange.traffic.values())
        return new_state, RoundResult(
            server_round=server_round,
            train_loss=_train_loss(updates),
            update_norm=update_norm(new_state.adapter, state.adapter),
            product_error=combined.product_error,
            participants=participants,
            bytes_down=sum(sent.bytes_down for sent in exchange.traffic.values()),
            bytes_up=bytes_up,
            bytes_up_plain=bytes_up + sum(outcome.bytes_saved for outcome in trained.outcomes),
            num_tokens=trained.num_hidden_tokens + sum(r.num_tokens for r in participants),
            seconds=time.perf_counter() - start,
            peak_rss_bytes=peak_rss_bytes(),
            refresh_bytes=refresh_bytes,
            simulated=plan.simulated,
            set_aside=tuple(self._defence.set_aside(num_rejections)),
            privacy=self._privacy.record(new_state.private_steps, server_round),
            warnings=(*warnings, *combined.warnings),
        )

    def _private_steps(
        self, state: FederationState, plan: RoundPlan, clients: Mapping[str, ClientState]
    ) -> Steps:
        if self._privacy.example is None:
            return state.private_steps
        num_examples = {name: client.num_examples for name, client in clients.items()}
        return self._privacy.example.after(state.private_steps, plan, num_examples)

    def _epsilon_of(self, client_id: str, state: FederationState) -> float | None:
        if self._privacy.example is None or client_id not in state.private_steps:
            return None
        return self._privacy.example.epsilon(state.private_steps[client_id])

    def _align(self, state: FederationState, clients: dict[str, ClientState]) -> Mapping[str, int]:
        """Align the emulators anew; what devices hold of them is then no longer the rung."""
        assert self._realign is not None, "checked with the plan"
        old = self.rungs
        self.rungs, refresh_bytes = self._realign(state.adapter, state.server_round + 1)
        for client_id, client in clients.items():
            held = (n for n in client.held_rungs if self.rungs[n].sha256 == old[n].sha256)
            clients[client_id] = replace(client, held_rungs=tuple(held))
        return refresh_bytes

    def _check_plan(
        self, server_round: int, plan: RoundPlan, clients: Mapping[str, ClientState]
    ) -> None:
        """Check that a controller asks for what there is, once from each."""
        seen: set[str] = set()
        for client in plan.cohort:
            name, wrong = client.client_id, ""
            if name not in clients or name in seen:
                wrong = "names twice" if name in seen else "names, but nobody knows,"
            elif client.rung not in self.rungs:
                wrong = f"wants the rung {client.rung!r}, not one of {sorted(self.rungs)}, for"
            elif client.local_steps < 1:
                wrong = f"wants {client.local_steps} local steps, not at least 1, of"
            if wrong:
                raise AggregationError(f"round {server_round}: the plan {wrong} client {name!r}")
            seen.add(name)
        if plan.realigns and self._realign is None:
            raise AggregationError(
                f"round {server_round}: the plan aligns emulators anew, which needs data of the "
                "server and an emulator that is not the full model"
            )
        if plan.server_steps < 0:
            raise AggregationError(
                f"round {server_round}: the plan's server_steps must be at least 0, "
                f"got {plan.server_steps}"
            )

    def _train(
        self,
        state: FederationState,
        plan: RoundPlan,
        clients: Mapping[str, ClientState],
        lasting: Mapping[str, Mapping[str, State]],
        exchange: Exchange,
    ) -> Trained:
        """Let the cohort train, and the server meanwhile; return what came of each, as planned."""
        server_round = state.server_round + 1
        tuned = self._lora.tuned_part(server_round)
        starts = self._starts(state, plan)
        lost = {
            client.client_id: Reply(client.client_id, error=client.lost, lost=True)
            for client in plan.cohort
            if client.lost
        }
        unequipped = {**lost, **self._exchange_emulators(plan, clients, exchange)}
        ready = [client for client in plan.cohort if client.client_id not in unequipped]
        joint = self._joint(state, plan, unequipped, starts, exchange)
        if joint is not None:
            if not joint.parts:
                return joint.finish(unequipped, [])
            ready = [client for client in ready if client.client_id in joint.parts]
        own: list[Payload] = []
        tasks = {
            client.client_id: self._train_task(
                server_round,
                client,
                starts[client.client_id],
                clients[client.client_id],
                lasting[client.rung],
                None if joint is None else joint.parts[client.client_id],
            )
            for client in ready
        }
        answers = exchange.collect(
            "train",
            tasks,
            meanwhile=lambda: own.extend(self._train_server(state, server_round, plan)),
            quorum_ratio=self._quorum_ratio,
        )
        if self._reception is not None:
            longest = {c: longest_update(part_of(starts[c], tuned)) for c in answers}
            self._reception.remember(answers, longest)
        start = part_of(state.adapter, tuned)
        server = [admit(SERVER_ID, payload, start, {}, self._limits) for payload in own]
        replies: dict[str, Reply | None] = {**answers, **unequipped}
        del answers
        if joint is not None:
            return joint.finish(replies, server)
        outcomes = []
        for client in plan.cohort:
            expected = {"server_round": server_round, "emulator": self.rungs[client.rung].sha256}
            if self._privacy.example is not None:  # losses would tell what the noise hides
                expected |= dict.fromkeys(("first_loss", "last_loss", "mean_loss"))
            reply = replies.pop(client.client_id, None)  # its bytes are free once it is decoded
            start = part_of(starts[client.client_id], tuned)
            outcome = judge(client.client_id, reply, start, expected, self._limits, self._codec)
            sent = exchange.traffic[client.client_id]
            outcomes.append(with_traffic(outcome, sent, client.rung))
        return trained_apart(outcomes, server)

    def _joint(
        self,
        state: FederationState,
        plan: RoundPlan,
        unequipped: Mapping[str, Reply | None],
        starts: Mapping[str, State],
        exchange: Exchange,
    ) -> JointRound | None:
        """Have devices share their secrets; None where updates come in clear, or none come."""
        if self._secure is None or not plan.cohort:
            return None
        return JointRound(
            self._secure,
            plan.cohort,
            unequipped,
            server_round=state.server_round + 1,
            starts=starts,
            tuned=self._lora.tuned_part(state.server_round + 1),
            emulators={name: rung.sha256 for name, rung in self.rungs.items()},
            settings=self._settings,
            exchange=exchange,
        )

    def _starts(self, state: FederationState, plan: RoundPlan) -> dict[str, State]:
        """Return the adapter that each device of a cohort starts from: that of its own blocks."""
        starts: dict[str, State] = {}
        for name, rung in self.rungs.items():
            members = [client.client_id for client in plan.cohort if client.rung == name]
            starts |= self._lora.starts(members, rung.own(state.adapter))
        return starts

    def _exchange_emulators(
        self, plan: RoundPlan, clients: Mapping[str, ClientState], exchange: Exchange
    ) -> dict[str, Reply | None]:
        """Send those of the cohort what they lack of their emulator; return who lacks it still."""
        current = hashes_of(self.rungs.values())
        messages: dict[tuple[str, frozenset[str]], bytes] = {}  # devices in one case share one
        tasks = {}
        for client in plan.cohort:
            held, rung = clients[client.client_id], self.rungs[client.rung]
            if client.rung not in held.held_rungs:
                case = client.rung, rung.lacking(held.held_parts)
                if case not in messages:
                    offer = None if self._reception is None else self._reception.offer
                    messages[case] = rung.hold_message(case[1], current, offer)
                tasks[client.client_id] = messages[case]
        replies = exchange.collect("hold", tasks)
        if self._reception is not None:
            offered = {
                c.client_id: sum(map(len, self.rungs[c.rung].parts.values())) for c in plan.cohort
            }
            self._reception.count_fetched(replies, exchange, offered)
        wanted = {c.client_id: self.rungs[c.rung].sha256 for c in plan.cohort}
        answers = {c: _if_held(replies.get(c), wanted[c]) for c in tasks}
        return {c: reply for c, reply in answers.items() if reply is None or reply.content is None}

    def _train_task(
        self,
        server_round: int,
        client: ClientPlan,
        start: State,
        known_of: ClientState,
        lasting: Mapping[str, State],
        secure: Mapping[str, Any] | None,
    ) -> bytes:
        kept, settings = known_of.kept_part, self._settings
        if self._privacy.example is not None:
            settings = self._privacy.example.settings(settings, known_of.num_examples)
        known = lasting.get(kept, {})  # what it kept on another rung is of no use on this one
        return train_message(
            {name: array for name, array in start.items() if name not in known},
            server_round=server_round,
            emulator=self.rungs[client.rung].sha256,
            num_steps=client.local_steps,
            first_step=(server_round - 1) * client.local_steps,
            settings=settings,
            seed=derive_seed(self._seed, "client", client.client_id),
            tuned=self._lora.tuned_part(server_round),
            left_out=kept if known else "",
            rank=self._lora.client_ranks.get(client.client_id),
            codec=self._codec,
            secure=secure,
        )

    def _train_server(
        self, state: FederationState, server_round: int, plan: RoundPlan
    ) -> list[Payload]:
        if self._server_training is None or plan.server_steps == 0:
            return []
        first_step = (server_round - 1) * plan.server_steps
        seed = derive_seed(self._seed, "client", SERVER_ID)
        tuned = self._lora.tuned_part(server_round)
        return [self._server_training(state.adapter, tuned, plan.server_steps, first_step, seed)]


def _if_held(reply: Reply | None, sha256: str) -> Reply | None:
    """Return the reply to a "hold" message; a failure if it does not say that all is there."""
    if reply is None or reply.content is None:
        return reply
    try:
        held = decode(reply.content, MAX_ANSWER_BYTES).record.get("held")
    except WireError as error:
        return replace(reply, content=None, error=str(error))
    if held != sha256:
        return replace(reply, content=None, error=f"held must be {sha256[:12]}, got {shown(held)}")
    return reply


def _train_loss(updates: list[Outcome]) -> float | None:
    """Return the mean loss of all that took part and told theirs, each alike."""
    losses = [u.mean_loss for u in updates for _ in range(u.num_devices) if u.mean_loss is not None]
    return float(np.mean(losses)) if losses else None


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far [byte]."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_better(metric: str, new: float, old: float | None) -> bool:
    """Say whether a quality is better; one that is not a number never is."""
    if math.isnan(new):
        return False
    return old is None or (new < old if metric == "perplexity" else new > old)
