"""What attacks on updates found: read from privacy_audit.json, told in two tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedpeat.report.fields import Fields, read_record
from fedpeat.report.markup import Html, element, join
from fedpeat.report.quantities import count_text, number_text, ratio_text
from fedpeat.report.records import Inverted, Membership, MembershipAttack, PrivacyAudit

__all__ = ["load_privacy_audit", "privacy_audit_lead", "privacy_audit_section"]

_DEFENCES: Final = {
    "none": "None",
    "example_level": "Noise on the device",
    "secure_aggregation": "Only the sum is seen",
    "client_level": "Clipped sum with noise",
    "run": "As the run made it",
}
_TRAININGS: Final = {
    "round": "A round as in the run",
    "overfit": "Few blocks, many steps",
    "tuned model": "The tuned model",
    "one step": "One text, one step",
}
_ATTACKS: Final = {
    "loss": "Loss after",
    "gain": "Loss before - after",
    "others": "The same, beyond others' updates",
}
_MEANING: Final = (
    "AUC: chance that an example in the update gets a higher score than one that is not, with its "
    "95 % bootstrap interval; 0.5 is guessing. Found: share of the members found at 1 % of false "
    "alarms; guessing finds 1 %. Few blocks and many steps is where attacks must work. Epsilon is "
    "of this one round."
)
_ROUGE: Final = (
    "Texts that a search reads back from an update, compared with the true ones; beside them "
    "another text of the same device, which is what the domain alone gives. 1 is the text word by "
    "word."
)


def load_privacy_audit(run_dir: Path) -> PrivacyAudit | None:
    """Return what privacy_audit.json of a folder says; None where there is none.

    Raises:
        DataError: If it is not as expected.
    """
    fields = read_record(run_dir / "privacy_audit.json")
    if fields is None:
        return None
    return PrivacyAudit(
        fields.amount("num_devices"),
        tuple(_membership(item) for item in fields.children("membership")),
        tuple(_inverted(item) for item in fields.children("inversion")),
    )


def _membership(fields: Fields) -> Membership:
    attacks = fields.child("attacks") or Fields({}, fields.where)
    made = [(name, attacks.child(name)) for name in _ATTACKS]
    return Membership(
        fields.choice("training", tuple(_TRAININGS)),
        fields.choice("defence", tuple(_DEFENCES)),
        fields.number("epsilon"),
        fields.amount("num_members"),
        fields.amount("num_others"),
        tuple(
            MembershipAttack(name, *(found.number(key) for key in ("auc", "low", "high", "tpr")))
            for name, found in made
            if found
        ),
    )


def _inverted(fields: Fields) -> Inverted:
    return Inverted(
        fields.choice("training", tuple(_TRAININGS)),
        fields.choice("defence", tuple(_DEFENCES)),
        fields.number("epsilon"),
        fields.amount("num_texts"),
        *(fields.number(key) for key in ("rouge_1", "rouge_l")),
        *(fields.number(f"baseline_{key}") for key in ("rouge_1", "rouge_l")),
    )


def privacy_audit_lead(audit: PrivacyAudit) -> str:
    """Return what was measured, in a line."""
    return (
        f"What the server can tell from updates of {count_text(audit.num_devices)} devices, made "
        "anew for the audit, with and without each defence. Another attacker may do better."
    )


def privacy_audit_section(audit: PrivacyAudit) -> Html:
    """Return the tables of membership and of inversion."""
    return join(
        [
            element("p", _MEANING, class_="note"),
            _table(
                "Is an example in the update?",
                ["Update", "Defence", "Epsilon", "Attack", "AUC", "Found", "Examples"],
                [
                    _membership_row(item, attack)
                    for item in audit.membership
                    for attack in item.attacks
                ],
            ),
            element("p", _ROUGE, class_="note"),
            _table(
                "What is the text?",
                ["Update", "Defence", "Epsilon", "ROUGE-1", "ROUGE-L", "Another text", "Texts"],
                [_inverted_row(item) for item in audit.inversion],
            ),
        ]
    )


def _membership_row(item: Membership, attack: MembershipAttack) -> list[str]:
    interval = f"[{number_text(attack.low, 2)}, {number_text(attack.high, 2)}]"
    return [
        _TRAININGS[item.training],
        _DEFENCES[item.defence],
        _epsilon(item.epsilon),
        _ATTACKS[attack.name],
        f"{number_text(attack.auc, 2)} {interval}",
        ratio_text(attack.tpr),
        f"{count_text(item.num_members)} and {count_text(item.num_others)}",
    ]


def _inverted_row(item: Inverted) -> list[str]:
    baseline = f"{number_text(item.baseline_rouge_1, 2)}, {number_text(item.baseline_rouge_l, 2)}"
    return [
        _TRAININGS[item.training],
        _DEFENCES[item.defence],
        _epsilon(item.epsilon),
        number_text(item.rouge_1, 2),
        number_text(item.rouge_l, 2),
        baseline,
        count_text(item.num_texts),
    ]


def _epsilon(epsilon: float | None) -> str:
    return "-" if epsilon is None else number_text(epsilon, 3)


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    head = [
        element("th", name, scope="col", class_="n" if place > 1 else None)
        for place, name in enumerate(names)
    ]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *[element("td", text, class_="n" if i else None) for i, text in enumerate(row[1:])],
        )
        for row in rows
    ]
    table = element(
        "table",
        element("caption", title),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=title)
