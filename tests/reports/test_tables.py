# SPDX-License-Identifier: Apache-2.0
"""The terminal tables hold the numbers they are made from."""

import io

from rich.console import Console

from quattuor.checkpoints import LayerRow, VerifiedRow
from quattuor.reports import tables
from quattuor.systems import SYSTEMS


def _shown(table):
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_systems_show_every_setting_with_its_default():
    shown = _shown(tables.systems_table(SYSTEMS))
    assert all(name in shown for name in SYSTEMS)
    assert "group_size=128" in shown
    assert "damping=0.01" in shown


def test_quantization_shows_errors_time_and_memory(result):
    shown = _shown(tables.quantization_table(result))
    for part in ("tiny & small: qqq", "6 in 3 blocks", "4.500", "2.000e-03", "seconds: solve", "6.0", "1.50 GB"):
        assert part in shown
    assert "8 x 512 tokens of pydoc" in shown


def test_evaluations_show_their_ratio_to_the_first(result):
    shown = _shown(tables.evaluation_table(result.evaluations, caption="Note [once]"))
    lines = [line for line in shown.splitlines() if "pydoc" in line]
    assert "1.0000" in lines[0]
    assert "1.1500" in lines[1]
    assert "16 x 2048" in lines[1]


def test_generations_are_not_read_as_markup(result):
    shown = _shown(tables.generation_table(result.generations))
    assert "Why <b>?Because & so." in shown


def test_inspection_and_verification_list_their_rows():
    row = LayerRow(
        name="m.layers.0.up",
        out_features=4,
        in_features=8,
        format="Integer(bits=4)",
        granularity="PerChannel()",
        activations=None,
        bits_per_weight=4.5,
        error=None,
    )
    shown = _shown(tables.inspection_table([row]))
    assert "m.layers.0.up" in shown
    assert "4 x 8" in shown
    assert "4.500" in shown
    verified = VerifiedRow(name="m.layers.0.up", checks=("hash", "codes"), note="as [in] the original")
    assert "hash, codes" in _shown(tables.verification_table([verified]))
    assert "as [in] the original" in _shown(tables.verification_table([verified]))
