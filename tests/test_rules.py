# SPDX-License-Identifier: Apache-2.0
"""Rules: first match wins, and a rule that is nobody's first match is an error."""

import pytest
from tiny_models import tiny_config

from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import Integer
from quattuor.granularity import PerChannel
from quattuor.models import DecoderDescription, describe
from quattuor.rules import Rule, check_all_rules_match, match, resolve_roles
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


def patterns(rule: Rule, family: str) -> list[str]:
    """Return what a rule for roles stands for in an architecture."""
    return [resolved.pattern for resolved in resolve_roles((rule,), describe(tiny_config(family)))]


def test_roles_stand_for_the_names_of_an_architecture() -> None:
    rule = Rule(roles=("query", "key"), weights=EIGHT)
    assert patterns(rule, "llama") == ["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.k_proj"]
    assert patterns(rule, "phi3") == ["model.layers.*.self_attn.qkv_proj"], "a fused linear is named once"
    assert patterns(Rule(roles=("up", "down"), skip=True), "opt") == [
        "model.decoder.layers.*.fc1",
        "model.decoder.layers.*.fc2",
    ]
    resolved = resolve_roles((Rule(pattern="*", skip=True), rule), describe(tiny_config("llama")))
    assert [item.roles for item in resolved] == [()] * 3
    assert resolved[0] == Rule(pattern="*", skip=True)
    assert [item.weights for item in resolved[1:]] == [EIGHT, EIGHT]
    assert match("model.layers.11.self_attn.k_proj", resolved[1:]) is resolved[2]


def test_roles_that_an_architecture_does_not_have() -> None:
    with pytest.raises(
        UnsupportedError, match="name a gate linear, which opt is not known to have; use a pattern"
    ):
        patterns(Rule(roles=("gate",), skip=True), "opt")
    found = DecoderDescription(
        family="found",
        model_types=(),
        blocks="blocks",
        embeddings=(),
        final_norm=None,
        head="head",
        linears=("a",),
    )
    with pytest.raises(UnsupportedError, match="name a query linear, which found is not known to have"):
        resolve_roles((Rule(roles=("query",), skip=True),), found)


@pytest.mark.parametrize(
    "options", [{"roles": ("query",), "pattern": "*", "skip": True}, {"skip": True}, {"roles": ("query",)}]
)
def test_rules_name_either_a_pattern_or_roles(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"Rule: rule=.* must either skip or change something"):
        Rule(**options)


def test_roles_that_do_not_exist() -> None:
    with pytest.raises(
        InputError, match=r"Rule: roles=.* are not all among .*; correct queries, or use a pattern"
    ):
        Rule(roles=("key", "queries"), skip=True)
