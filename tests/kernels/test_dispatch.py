# SPDX-License-Identifier: Apache-2.0
"""The choice of an implementation: order, reasons, forcing, and the checks of a problem."""

import itertools

import pytest
import torch

from quattuor.errors import InputError, UnsupportedError
from quattuor.kernels.dispatch import (
    MAX_IN_FEATURES,
    TOKEN_RANGES,
    Implementation,
    LinearProblem,
    Operand,
    choose,
)


class Named(Implementation):
    """An implementation with a given refusal and a given preference, which computes nothing."""

    def __init__(self, name, refusal=None, slow_for=()):
        self.name = self.layout = name
        self.stored_bits = dict.fromkeys(range(2, 9), 4)
        self.refusal, self.slow_for = refusal, slow_for

    def supports(self, problem):
        return self.refusal

    def declines(self, problem, tokens):
        return f"slow for {tokens} tokens" if str(tokens) in self.slow_for else None

    def prepare(self, problem, *tensors):
        return {}

    def linear(self, problem, inputs, operand, bias, out_dtype):
        raise AssertionError("not called")


PROBLEM = LinearProblem(out_features=8, in_features=16)
PREFILL = str(TOKEN_RANGES[-1])


def test_first_supporting_implementation_wins_and_every_row_has_a_reason():
    table = (Named("a", refusal="needs a GPU"), Named("b", slow_for=(PREFILL,)), Named("c"))
    schedule = choose("op", table, PROBLEM)
    assert [schedule.implementation(m).name for m in (0, 1, 16, 17, 128, 129, 10**6)] == ["b"] * 5 + ["c"] * 2
    assert len(schedule.rows) == len(TOKEN_RANGES) * len(table)
    assert all(row.reason for row in schedule.rows)
    assert [row.implementation for row in schedule.rows if row.is_chosen] == ["b"] * 5 + ["c"]
    reasons = {(row.tokens, row.implementation): row.reason for row in schedule.rows}
    assert reasons["2-16", "a"] == "needs a GPU"
    assert reasons["2-16", "c"] == "ranked after b"
    assert reasons[PREFILL, "b"] == f"slow for {PREFILL} tokens"
    assert set(schedule.layouts()) == {"b", "c"}


def test_ranges_are_consecutive_and_complete():
    assert TOKEN_RANGES[0].first == 0
    assert TOKEN_RANGES[-1].last is None
    for before, after in itertools.pairwise(TOKEN_RANGES):
        assert before.last + 1 == after.first


def test_force_overrides_preference_but_not_refusal():
    table = (Named("a", refusal="needs a GPU"), Named("b", slow_for=(PREFILL,)), Named("c"))
    assert choose("op", table, PROBLEM, "b").implementation(1000).name == "b"
    assert choose("op", table, PROBLEM, "c").implementation(1).name == "c"
    with pytest.raises(UnsupportedError, match="needs a GPU"):
        choose("op", table, PROBLEM, "a")
    with pytest.raises(InputError, match="use one of a, b, c"):
        choose("op", table, PROBLEM, "d")


def test_negative_token_count_is_an_error():
    with pytest.raises(InputError, match="num_tokens=-1"):
        choose("op", (Named("a"),), PROBLEM).implementation(-1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("out_features", 0),
        ("in_features", -1),
        ("in_features", MAX_IN_FEATURES + 1),
        ("weight_bits", 1),
        ("weight_bits", 9),
        ("group_size", 0),
        ("activation_bits", 4),
        ("integer_group_scale", True),
        ("zero_point", True),
        ("output_dtype", torch.int8),
    ],
)
def test_impossible_problems_are_refused(field, value):
    fields = {"out_features": 8, "in_features": 16} | {field: value}
    with pytest.raises(InputError, match=field):
        LinearProblem(**fields)


def test_longest_row_cannot_overflow_int32():
    assert 128 * 128 * MAX_IN_FEATURES < 2**31 <= 128 * 128 * (MAX_IN_FEATURES + 1)


@pytest.mark.parametrize(("bits", "remark"), [(4, ""), (3, "; keeps each 3-bit code in 4 bits of memory")])
def test_explain_says_what_a_code_costs(bits, remark):
    problem = LinearProblem(out_features=8, in_features=16, weight_bits=bits)
    (chosen,) = {row.reason for row in choose("op", (Named("a"),), problem).rows}
    assert chosen == "first that supports the layer" + remark


def test_operand_selects_a_layout_and_counts_bytes():
    operand = Operand({"a.x": torch.zeros(3, dtype=torch.int8), "b.x": torch.zeros(2)})
    assert list(operand.layout("a")) == ["x"]
    assert operand.nbytes == 3 + 8
    assert sorted(Operand(operand.tensors()).entries) == ["a.x", "b.x"]
