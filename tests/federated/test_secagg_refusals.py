"""What a device refuses a server that lies, and a server a device that does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeat.core.errors import WireError
from fedpeat.core.wire import Payload
from fedpeat.federated.flower.keys import device_keys, make_keys
from fedpeat.federated.secagg import crypto
from fedpeat.federated.secagg.device import SecureDevice
from fedpeat.federated.secagg.identity import Authority, identity_of, simulated
from fedpeat.federated.secagg.terms import SECURE_KEY, Terms, read_terms
from secure_cohort import STEPS, Change, Cohort, cohort, identities, lost


def saying(**changes: Any) -> Callable[[Payload], Payload]:
    """Change entries of a record."""
    return lambda payload: Payload(payload.arrays, {**payload.record, **changes})


def keeping(kept: list[Payload]) -> Callable[[Payload], Payload]:
    """Keep a message, and change nothing."""

    def keep(payload: Payload) -> Payload:
        kept.append(payload)
        return payload

    return keep


def within(key: str, **changes: Any) -> Callable[[Payload], Payload]:
    """Change entries of a mapping in a record."""
    return lambda payload: saying(**{key: {**payload.record[key], **changes}})(payload)


def neighbour(name: str, **changes: Any) -> Callable[[Payload], Payload]:
    """Change entries of the keys of a neighbour."""

    def change(payload: Payload) -> Payload:
        keys = payload.record["neighbours"][name]
        return within("neighbours", **{name: {**keys, **changes}})(payload)

    return change


def refusal(group: Cohort, step: str, name: str = "d00") -> str:
    """Return with which line a device refused a step of a round."""
    group.aggregate()
    text = group.wire.errors[step, name]
    assert "\n" not in text
    return text


# --- a server in the middle -----------------------------------------------------------------------


@pytest.mark.parametrize("key", ["mask_key", "seal_key"])
def test_a_device_refuses_a_key_that_its_neighbour_did_not_sign(key: str) -> None:
    group = cohort(4)
    _, servers_own = crypto.key_pair(crypto.new_seed())
    change = neighbour("d01", **{key: servers_own.hex()})
    group.wire.asked["secagg_shares", "d00"] = change
    assert refusal(group, "secagg_shares") == "'d01' did not sign this"


def test_a_device_refuses_a_neighbour_whom_nobody_vouches_for() -> None:
    strangers, _ = simulated(["d01"])
    pem = strangers["d01"].certificate.decode()
    group = cohort(4)
    group.wire.asked["secagg_shares", "d00"] = neighbour("d01", certificate=pem)
    assert refusal(group, "secagg_shares") == "a certificate is not of this fleet's authority"


def test_a_device_refuses_a_neighbour_under_the_name_of_another() -> None:
    group = cohort(4)

    def renamed(payload: Payload) -> Payload:
        near = dict(payload.record["neighbours"])
        near["d09"] = near.pop("d01")
        return saying(neighbours=near)(payload)

    group.wire.asked["secagg_shares", "d00"] = renamed
    text = refusal(group, "secagg_shares")
    assert text == "the certificate of 'd09' is not that of a device of this name"


def test_the_servers_own_certificate_makes_no_device_of_it(tmp_path: Path) -> None:
    make_keys(tmp_path, ["localhost"], ["d00"])
    server = tmp_path / "server"
    authority = Authority((server / "ca.crt").read_bytes())
    device = device_keys(tmp_path / "devices" / "d00")
    own = identity_of(device.name, device.ca, device.key, device.certificate)
    authority.check("d00", own.certificate, own.sign(b"text"), b"text")
    certificate = (server / "server.crt").read_bytes()
    with pytest.raises(WireError, match="is not that of a device of this name"):
        authority.check("fedpeat server", certificate, own.sign(b"text"), b"text")


@pytest.mark.parametrize(
    "change",
    [
        {"server_round": 2},
        {"session": "another try"},
        {"run": "another run"},
        {"num_bits": 8},
        {"clip_range": 1e-9},
        {"adapter": "0" * 64},
        {"work": "0" * 64},
        {"max_examples": 5},
        {"threshold_ratio": 0.9},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_device_refuses_neighbours_that_were_told_other_terms(change: Mapping[str, Any]) -> None:
    devices = {name: SecureDevice(own, 3) for name, own in identities(4)[0].items()}
    near = {
        name: device.kinds["secagg_keys"](
            Payload(record={"terms": asdict(terms(**change) if name == "d02" else terms())})
        ).record["keys"]
        for name, device in devices.items()
    }
    own = near.pop("d00")
    assert own["certificate"]
    record = {"session": terms().session, "neighbours": near}
    with pytest.raises(WireError, match="^'d02' did not sign this$"):
        devices["d00"].kinds["secagg_shares"](Payload(record=record))


@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_a_device_refuses_secrets_that_half_of_the_others_could_open(ratio: float) -> None:
    group = cohort(4, threshold_ratio=ratio)
    assert "more than half" in refusal(group, "secagg_keys")


def test_a_device_refuses_to_hide_among_fewer_than_it_wants() -> None:
    group = cohort(4)

    def fewer(payload: Payload) -> Payload:
        return saying(neighbours={"d01": payload.record["neighbours"]["d01"]})(payload)

    group.wire.asked["secagg_shares", "d00"] = fewer
    assert refusal(group, "secagg_shares") == "2 devices are too few to hide among, 3 wanted"


def test_a_device_refuses_two_neighbours_with_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [SecureDevice(own, 3) for own in identities(3)[0].values()]
    with monkeypatch.context() as patch:
        patch.setattr(crypto, "new_seed", lambda: b"0" * crypto.SEED_BYTES)
        _, one, other = (
            device.kinds["secagg_keys"](Payload(record={"terms": asdict(terms())}))
            for device in devices
        )
    near = {"d01": one.record["keys"], "d02": other.record["keys"]}
    record = {"session": terms().session, "neighbours": near}
    with pytest.raises(WireError, match="two devices of a round must not have the same key"):
        devices[0].kinds["secagg_shares"](Payload(record=record))


def terms(**changes: Any) -> Terms:
    plain = Terms(
        run="run",
        session="session",
        server_round=1,
        cohort_size=4,
        threshold_ratio=0.6,
        num_neighbours=3,
        clip_range=1.0,
        num_bits=24,
        max_examples=100,
        clip_norm=None,
        adapter="a",
        work="w",
        emulators=("e",),
    )
    return replace(plain, **changes)


@pytest.mark.parametrize(
    "change",
    [
        {"server_round": 0},
        {"server_round": True},
        {"cohort_size": 1.5},
        {"num_bits": 33},
        {"num_bits": 1},
        {"clip_range": float("nan")},
        {"clip_norm": 0},
        {"threshold_ratio": 1.1},
        {"run": ""},
        {"session": "s" * 129},
        {"emulators": ["e"] * 65},
        {"emulators": [1]},
        {"emulators": 3},
        {"more": 1},
    ],
    ids=str,
)
def test_terms_out_of_range_are_refused_with_one_line(change: Mapping[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        read_terms({**asdict(terms()), **change})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


# --- the train message --------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["server_round", "emulator", "work"])
def test_a_device_trains_nothing_but_what_was_agreed(key: str) -> None:
    group = cohort(4)
    group.wire.asked["train", "d00"] = saying(**{key: 7 if key == "server_round" else "another"})
    assert "of the round's terms" in refusal(group, "train")


def test_a_device_trains_no_adapter_but_the_one_agreed_on() -> None:
    group = cohort(4)
    group.wire.asked["train", "d00"] = lambda p: Payload(
        {name: array * 0 for name, array in p.arrays.items()}, p.record
    )
    assert "adapter or settings are not those of the round's terms" in refusal(group, "train")


def test_a_device_masks_one_update_in_a_session() -> None:
    group = cohort(4)
    tasks: list[Payload] = []
    group.wire.asked["train", "d00"] = keeping(tasks)
    group.wire.answered["secagg_survivors", "d00"] = lost  # the session stays open
    group.aggregate()
    record = tasks[0].record
    part = record[SECURE_KEY]
    with pytest.raises(WireError, match="this step comes after 'shares'"):
        group.wire.members["d00"].secure.begin(
            part, tasks[0].arrays, record["server_round"], record["emulator"], record["work"]
        )


def test_a_device_that_masks_its_updates_sends_none_in_clear() -> None:
    group = cohort(4)

    def plain(payload: Payload) -> Payload:
        return saying(**{SECURE_KEY: None})(payload)

    group.wire.asked["train", "d00"] = plain
    text = refusal(group, "train")
    assert text == "this device takes part with secure aggregation only"


def test_a_device_refuses_shares_that_were_changed_on_the_way() -> None:
    group = cohort(4)

    def changed(payload: Payload) -> Payload:
        part = payload.record[SECURE_KEY]
        sealed = bytearray.fromhex(part["shares"]["d02"])
        sealed[-1] ^= 1
        shares = {**part["shares"], "d02": sealed.hex()}
        return saying(**{SECURE_KEY: {**part, "shares": shares}})(payload)

    group.wire.asked["train", "d00"] = changed
    assert refusal(group, "train") == "the shares of 'd02' are not what it sealed"


def test_a_device_refuses_shares_that_were_sealed_for_another() -> None:
    group = cohort(4)
    sealed: dict[str, Any] = {}

    def kept(payload: Payload) -> Payload:
        sealed.update(payload.record["shares"])
        return payload

    def swapped(payload: Payload) -> Payload:
        part = payload.record[SECURE_KEY]
        shares = {**part["shares"], "d02": sealed["d01"]}
        return saying(**{SECURE_KEY: {**part, "shares": shares}})(payload)

    group.wire.answered["secagg_shares", "d02"] = kept
    group.wire.asked["train", "d00"] = swapped
    assert refusal(group, "train") == "the shares of 'd02' are not what it sealed"


def test_a_device_trains_only_with_enough_others_to_hide_among() -> None:
    group = cohort(4)

    def fewer(payload: Payload) -> Payload:
        part = payload.record[SECURE_KEY]
        shares = {"d01": part["shares"]["d01"]}
        return saying(**{SECURE_KEY: {**part, "shares": shares}})(payload)

    group.wire.asked["train", "d00"] = fewer
    assert refusal(group, "train") == "shares of 1 other devices are too few, 2 wanted"


# --- opening ------------------------------------------------------------------------------------


def halves(group: Cohort) -> None:
    """Tell two devices that d03 is gone, and the others that it is not."""
    for name in ("d00", "d01"):
        group.wire.asked["secagg_survivors", name] = saying(survivors=["d00", "d01", "d02"])


def test_devices_told_of_different_survivors_open_nothing() -> None:
    group = cohort(4)
    halves(group)
    sums, _, shortage = group.aggregate()
    assert sums is None
    assert shortage.startswith("too few devices gave their shares: 0 of")
    assert not [1 for kind, _, _ in group.wire.seen if kind == "secagg_unmask"]


def test_a_device_opens_nothing_for_signatures_under_another_list() -> None:
    group = cohort(4)
    halves(group)
    signed: dict[str, str] = {}

    def kept(name: str) -> Change:
        def keep(payload: Payload) -> Payload:
            signed[name] = payload.record["signature"]
            return payload

        return keep

    for name in group.wire.members:
        group.wire.answered["secagg_survivors", name] = kept(name)
    group.aggregate()
    record = {"session": group.wire.seen[0][2].record["session"]}
    device = group.wire.members["d00"].secure
    others = {name: signed[name] for name in ("d01", "d02")}
    with pytest.raises(WireError, match="'d02' did not sign this"):
        device.kinds["secagg_unmask"](Payload(record={**record, "signatures": others}))
    own = {"d01": signed["d01"]}
    with pytest.raises(WireError, match="2 signatures are too few, 3 wanted"):
        device.kinds["secagg_unmask"](Payload(record={**record, "signatures": own}))


def test_a_device_signs_one_list_and_opens_once() -> None:
    group = cohort(4)
    questions: dict[str, Payload] = {}

    def kept(kind: str) -> Change:
        def keep(payload: Payload) -> Payload:
            questions[kind] = payload
            return payload

        return keep

    for kind in ("secagg_survivors", "secagg_unmask"):
        group.wire.asked[kind, "d00"] = kept(kind)
    again: list[str] = []

    def once_more(payload: Payload) -> Payload:
        with pytest.raises(WireError) as caught:
            group.wire.members["d00"].secure.kinds["secagg_survivors"](
                saying(survivors=["d00", "d01", "d02"])(questions["secagg_survivors"])
            )
        again.append(str(caught.value))
        return payload

    group.wire.answered["secagg_survivors", "d00"] = once_more
    sums, _, _ = group.aggregate()
    assert sums is not None
    assert again == ["this step comes after 'masked', the session is at 'signed'"]
    with pytest.raises(WireError, match="not a message of the session that this device is in"):
        group.wire.members["d00"].secure.kinds["secagg_unmask"](questions["secagg_unmask"])


@pytest.mark.parametrize(
    ("listed", "why"),
    [
        (["d01", "d02", "d03"], "with this device's among them"),
        (["d00", "d01"], "2 survivors are too few, 3 wanted"),
        (["d00", "d00", "d01", "d02"], "survivors must be a list of names"),
        ("d00", "survivors must be a list of names"),
        ([["d00"]], "survivors must be a list of names"),
    ],
)
def test_a_device_signs_no_list_that_cannot_be(listed: object, why: str) -> None:
    group = cohort(4)
    group.wire.asked["secagg_survivors", "d00"] = saying(survivors=listed)
    assert why in refusal(group, "secagg_survivors")


def test_a_device_signs_no_list_with_a_neighbour_that_shared_no_secret() -> None:
    group = cohort(5)
    group.wire.answered["secagg_shares", "d04"] = lost
    everybody = sorted(group.wire.members)
    group.wire.asked["secagg_survivors", "d00"] = saying(survivors=everybody)
    text = refusal(group, "secagg_survivors")
    assert text == "a device cannot have survived that shared no secret"


@pytest.mark.parametrize("seed", range(5))
def test_the_server_never_has_both_shares_of_a_device(seed: int) -> None:
    group = cohort(6, seed=seed)
    rng = np.random.default_rng(seed)
    for name in rng.permutation(sorted(group.wire.members))[:2]:
        group.wire.answered[STEPS[rng.integers(1, 4)], str(name)] = lost
    group.aggregate()
    opened = [p.record for kind, _, p in group.wire.seen if kind == "secagg_unmask"]
    assert opened
    own = {name for record in opened for name in record["own_shares"]}
    others = {name for record in opened for name in record["key_shares"]}
    assert own
    assert not own & others


@pytest.mark.parametrize("kind", ["secagg_shares", "secagg_survivors", "secagg_unmask"])
def test_the_last_rounds_message_is_refused(kind: str) -> None:
    group = cohort(4)
    old: list[Payload] = []
    group.wire.asked[kind, "d00"] = keeping(old)
    group.aggregate()
    group.wire.asked[kind, "d00"] = lambda _: old[0]
    text = refusal(group, kind)
    assert text == "this is not a message of the session that this device is in"


# --- devices that misbehave -----------------------------------------------------------------------


def cut(payload: Payload) -> Payload:
    return Payload({"masked": payload.arrays["masked"][:-1]}, payload.record)


def in_clear(payload: Payload) -> Payload:
    return Payload({**payload.arrays, "lora_A": np.zeros(3)}, payload.record)


BAD_ANSWERS: list[tuple[str, Change, str]] = [
    ("secagg_keys", saying(keys=None), "keys of a round must be a mapping"),
    ("secagg_keys", saying(keys={}), "with a certificate"),
    ("secagg_keys", saying(session="old"), "session must be"),
    ("secagg_keys", within("keys", signature="00" * 64), "'d01' did not sign this"),
    ("secagg_keys", within("keys", signature="00"), "the signature of 'd01' must have 64 bytes"),
    ("secagg_keys", within("keys", mask_key="00" * 31), "must have 32 bytes, got 31"),
    ("secagg_keys", within("keys", certificate="no"), "not of this fleet's authority"),
    ("secagg_keys", within("keys", certificate="no" * 9999), "come with a certificate"),
    ("secagg_shares", saying(shares={}), "shares must be for all neighbours"),
    ("secagg_shares", saying(shares=dict.fromkeys(("d00", "d02", "d03"), "ab")), "must have 60 b"),
    ("secagg_shares", saying(shares=dict.fromkeys(("d00", "d02", "d03"), 5)), "hexadecimal text"),
    (
        "secagg_shares",
        saying(shares=dict.fromkeys(("d00", "d02", "d03"), "zz")),
        "hexadecimal text",
    ),
    ("secagg_shares", saying(session="old"), "session must be"),
    ("train", cut, "a masked vector must be uint8"),
    ("train", in_clear, "one masked vector, and no tensor besides"),
    ("train", saying(session="old"), "session must be"),
    ("train", saying(server_round=3), "server_round must be 1, got 3"),
    ("train", saying(seconds=float(3)), "seconds must be text"),
    *((kind, saying(more="x" * 2**21), "must have at most") for kind in STEPS[:2]),
    ("train", saying(more="x" * 2**21), "must have at most"),
]


@pytest.mark.parametrize(("kind", "change", "why"), BAD_ANSWERS)
def test_a_device_with_a_bad_answer_is_rejected_and_the_others_are_summed(
    kind: str, change: Change, why: str
) -> None:
    group = cohort(4)
    group.wire.answered[kind, "d01"] = change
    sums, outcomes, shortage = group.aggregate()
    assert outcomes["d01"].result.status == "rejected"
    assert why in outcomes["d01"].result.reason
    assert shortage == ""
    assert sums is not None
    for name, mean in group.plain_mean(["d00", "d02", "d03"]).items():
        np.testing.assert_allclose(sums.mean[name], mean, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        saying(own_shares={}),
        saying(own_shares=dict.fromkeys(("d00", "d01", "d02", "d03"), "ab")),
        saying(key_shares={"d02": "00" * 16}),
        saying(session="old"),
        lost,
    ],
)
def test_bad_shares_are_left_out_where_there_are_enough_others(change: Change) -> None:
    group = cohort(4)
    group.wire.answered["secagg_unmask", "d01"] = change
    sums, _, shortage = group.aggregate()
    assert (sums is not None, shortage) == (True, "")
    assert group.last is not None
    assert group.last.refused["d01"].result.status in {"rejected", "failed", "dropped"}


def test_a_wrong_signature_under_the_survivors_is_not_passed_on() -> None:
    group = cohort(4)
    group.wire.answered["secagg_survivors", "d01"] = saying(signature="00" * 64)
    sums, _, shortage = group.aggregate()
    assert (sums is not None, shortage) == (True, "")
    assert group.last is not None
    assert group.last.refused["d01"].result.reason == "'d01' did not sign this"


def test_a_wrong_share_gives_no_wrong_sum_but_none() -> None:
    group = cohort(4)
    wrong = dict.fromkeys(("d00", "d01", "d02", "d03"), "00" * 16)
    group.wire.answered["secagg_unmask", "d00"] = saying(own_shares=wrong)
    sums, _, shortage = group.aggregate()
    assert sums is None
    assert shortage.startswith("the sum of 4 devices' examples must be in [4, 4000], got ")


def test_a_wrong_share_of_a_key_is_noticed() -> None:
    group = cohort(5)
    group.wire.answered["train", "d04"] = lost
    group.wire.answered["secagg_unmask", "d00"] = saying(key_shares={"d04": "00" * 16})
    sums, _, shortage = group.aggregate()
    assert sums is None
    assert shortage == "the shares of the key of 'd04' do not give it"


def test_two_devices_with_one_key_are_not_both_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crypto, "new_seed", lambda: b"0" * crypto.SEED_BYTES)
    _, outcomes, shortage = cohort(4).aggregate()
    assert [o.result.reason for o in outcomes.values()] == ["another device has the same key"] * 3
    assert shortage == "too few devices sent keys: 1, 3 wanted"
