# SPDX-License-Identifier: Apache-2.0
"""Which module gets which quantizer; a rule that matches nothing is an error."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from quattuor.activations.base import ActivationQuantizer
from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.models import DecoderDescription
from quattuor.solvers.weight_quantizer import WeightQuantizer

__all__ = ["ROLES", "Rule", "check_all_rules_match", "match", "resolve_roles"]

ROLES = ("query", "key", "value", "output", "gate", "up", "down")
"""What a linear of a described block is for. A fused linear has several roles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """An exception for the modules whose full name matches a pattern, or that have one of the given roles.

    Args:
        pattern: Shell-style pattern of full module names, for example "model.layers.0.*" or "*.down_proj".
        roles: Instead of a pattern: "query", "key", "value", "output", "gate", "up" or "down", whatever these
            linears are called in an architecture.
        skip: Keep these modules in high precision.
        weights: Replaces the recipe's weight quantizer; None keeps it.
        activations: Replaces the recipe's activation quantizer; None keeps it.
    """

    pattern: str = ""
    roles: tuple[str, ...] = ()
    skip: bool = False
    weights: WeightQuantizer | None = None
    activations: ActivationQuantizer | None = None

    def __post_init__(self) -> None:
        """Reject rules that contradict themselves or do nothing."""
        changes = self.weights is not None or self.activations is not None
        if bool(self.pattern) == bool(self.roles) or self.skip == changes:
            raise InputError(
                compose(
                    subject="rule",
                    value=self.pattern or self.roles,
                    constraint="must either skip or change something, and name a pattern or roles",
                    place="Rule",
                    remedy="give exactly one of skip=True or a weight or activation quantizer",
                )
            )
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown:
            raise InputError(
                compose(
                    subject="roles",
                    value=self.roles,
                    constraint=f"are not all among {ROLES}",
                    place="Rule",
                    remedy=f"correct {unknown[0]}, or use a pattern of module names",
                )
            )


def resolve_roles(rules: Sequence[Rule], description: DecoderDescription) -> tuple[Rule, ...]:
    """Replace each rule for roles by rules for the names that its linears have in an architecture.

    Raises:
        UnsupportedError: The architecture was discovered, so that roles are unknown, or has no such linear.
    """
    resolved: list[Rule] = []
    for rule in rules:
        paths = dict.fromkeys(_path(role, rule, description) for role in rule.roles)
        patterns = [f"{description.blocks}.*.{path}" for path in paths]
        resolved += [replace(rule, pattern=pattern, roles=()) for pattern in patterns] or [rule]
    return tuple(resolved)


def _path(role: str, rule: Rule, description: DecoderDescription) -> str:
    """Return the path, inside a block, of the linear with a role."""
    part = description.attention if role in ("query", "key", "value", "output") else description.mlp
    path: str | None = getattr(part, role, None)
    if path is None:
        raise UnsupportedError(
            compose(
                subject="roles",
                value=rule.roles,
                constraint=f"name a {role} linear, which {description.family} is not known to have",
                place="Recipe.rules",
                remedy="use a pattern of module names",
            )
        )
    return path


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
