# SPDX-License-Identifier: Apache-2.0
"""Rules: first match wins, and a rule that is nobody's first match is an error."""

import pytest

from quattuor.errors import InputError
from quattuor.formats import Integer
from quattuor.granularity import PerChannel
from quattuor.rules import Rule, check_all_rules_match, match
from quattuor.scales import AbsMax
from quattuor.solvers import WeightQuantizer

NAMES = [f"model.layers.{index}.mlp.{name}" for index in (0, 1, 10) for name in ("up_proj", "down_proj")]
EIGHT = WeightQuantizer(number_format=Integer(8), granularity=PerChannel(), scales=AbsMax())


def test_first_match_wins() -> None:
    first, second = Rule(pattern="model.layers.0.*", skip=True), Rule(pattern="*.down_proj", weights=EIGHT)
    assert match(NAMES[1], (first, second)) is first
    assert match(NAMES[1], (second, first)) is second
    assert match("model.layers.1.mlp.down_proj", (first, second)) is second
    assert match("model.layers.10.mlp.up_proj", (first, second)) is None
    assert match("MODEL.layers.0.mlp.up_proj", (first,)) is None, "names are case-sensitive"


def test_all_rules_used() -> None:
    check_all_rules_match(NAMES, ())
    check_all_rules_match(iter(NAMES), (Rule(pattern="*.up_proj", skip=True), Rule(pattern="*", weights=EIGHT)))


@pytest.mark.parametrize(
    ("patterns", "unused"),
    [
        (("*.gate_proj",), r"\*.gate_proj"),
        (("*", "*.up_proj"), r"\*.up_proj"),
        (("*.up_proj", "*.up_proj"), r"\*.up_proj"),
        (("*.0.*", "*.q", "*.r"), r"\*.q, \*.r"),
    ],
)
def test_rules_without_effect(patterns: tuple[str, ...], unused: str) -> None:
    rules = [Rule(pattern=pattern, skip=True) for pattern in patterns]
    with pytest.raises(InputError, match=rf"rule pattern={unused} matches none of the 6 linears.*{NAMES[0]}"):
        check_all_rules_match(NAMES, rules)


def test_rule_without_names() -> None:
    with pytest.raises(InputError, match=r"such as \(none\)"):
        check_all_rules_match([], [Rule(pattern="*", skip=True)])


@pytest.mark.parametrize(
    "options", [{"pattern": "*"}, {"pattern": "*", "skip": True, "weights": EIGHT}, {"pattern": "", "skip": True}]
)
def test_rules_that_contradict_themselves(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"Rule: rule=.* must either skip or change something"):
        Rule(**options)
