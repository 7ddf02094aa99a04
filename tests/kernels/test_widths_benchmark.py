# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of widths computes without a GPU: floors and rows."""

import pytest

from benchmarks.kernels import widths
from benchmarks.kernels.timing import Contender
from benchmarks.kernels.timing import floor_us as floor_of_four


def contender(bits, granularity):
    return Contender(
        name=str(bits),
        granularity=granularity,
        includes_activation_quantization=False,
        copies=2,
        run=lambda batch, i: None,
        describe=lambda num_tokens: "triton",
    )


@pytest.mark.parametrize(("bits", "expected_us"), [(2, 13.7), (3, 20.5), (4, 27.4), (8, 54.7)])
def test_floor_grows_with_the_bytes_of_the_weight(bits, expected_us):
    assert widths.floor_us(bits, 1, 28672, 8192) == pytest.approx(expected_us, rel=0.005)
    assert widths.floor_us(bits, 8192, 28672, 8192) == widths.floor_us(4, 8192, 28672, 8192)
    assert widths.floor_us(4, 16, 4096, 4096) == floor_of_four(16, 4096, 4096)


def test_each_width_is_compared_with_four_bits_of_its_own_grouping():
    cases = [(2, "channel"), (4, "channel"), (2, "group128"), (4, "group128")]
    rows = widths.rows_of([contender(*case) for case in cases], [10.0, 20.0, 15.0, 21.0], 8, (4096, 4096))
    assert [row["over_4bit"] for row in rows] == [2.0, 1.0, 1.4, 1.0]
    assert [(row["bits"], row["granularity"]) for row in rows] == cases
    assert rows[0]["fraction_of_floor"] == pytest.approx(rows[0]["floor_us"] / 10, abs=2e-3)


def test_widths_without_four_bits_are_refused(capsys):
    with pytest.raises(SystemExit):
        widths.main(["--bits", "2,3"])
    assert "does not hold 4" in capsys.readouterr().err
