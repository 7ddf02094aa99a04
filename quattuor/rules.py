# SPDX-License-Identifier: Apache-2.0
"""Which module gets which quantizer; a rule that matches nothing is an error."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from quattuor.activations.base import ActivationQuantizer
from quattuor.errors import InputError, compose
from quattuor.solvers.weight_quantizer import WeightQuantizer

__all__ = ["Rule", "check_all_rules_match", "match"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """An exception for the modules whose full name matches a pattern.

    Args:
        pattern: Shell-style pattern of full module names, for example "model.layers.0.*" or "*.down_proj".
        skip: Keep these modules in high precision.
        weights: Replaces the recipe's weight quantizer; None keeps it.
        activations: Replaces the recipe's activation quantizer; None keeps it.
    """

    pattern: str
    skip: bool = False
    weights: WeightQuantizer | None = None
    activations: ActivationQuantizer | None = None

    def __post_init__(self) -> None:
        """Reject rules that contradict themselves or do nothing."""
        changes = self.weights is not None or self.activations is not None
        if not self.pattern or self.skip == changes:
            raise InputError(
                compose(
                    subject="rule",
                    value=self.pattern,
                    constraint="must either skip or change something, and name a pattern",
                    place="Rule",
                    remedy="give exactly one of skip=True or a weight or activation quantizer",
                )
            )


def match(name: str, rules: Sequence[Rule]) -> Rule | None:
    """Return the first rule whose pattern matches the module name."""
    return next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)


def check_all_rules_match(names: Iterable[str], rules: Sequence[Rule]) -> None:
    """Raise InputError when a rule is the first match of no name."""
    names = list(names)
    used = {id(rule) for name in names if (rule := match(name, rules)) is not None}
    unused = [rule.pattern for rule in rules if id(rule) not in used]
    if unused:
        raise InputError(
            compose(
                subject="rule pattern",
                value=", ".join(unused),
                constraint=f"matches none of the {len(names)} linears, or only ones that an earlier rule took",
                place="Recipe.rules",
                remedy=f"compare it with a real name, such as {names[0] if names else '(none)'}",
            )
        )
