# SPDX-License-Identifier: Apache-2.0
"""Progress bars go to standard error, count steps and accept what tasks do."""

from quattuor.cli_progress import Bars


def test_bars_show_steps_and_notes_on_standard_error(capfd):
    with Bars() as bars:
        bars.start("blocks", 3)
        bars.advance("blocks", note="error 1e-3")
        bars.advance("blocks", 2)
        bars.finish("blocks")
        bars.start("open", None)
        bars.advance("open")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "blocks" in captured.err
    assert "3/3" in captured.err
    assert "error 1e-3" in captured.err


def test_unknown_tasks_are_not_shown(capfd):
    with Bars() as bars:
        bars.advance("never started")
        bars.finish("never started")
    assert "never started" not in capfd.readouterr().err


def test_a_task_can_be_shown_twice(capfd):
    with Bars() as bars:
        for total in (2, 5):
            bars.start("perplexity", total)
            bars.advance("perplexity", total)
            bars.finish("perplexity")
    error = capfd.readouterr().err
    assert "2/2" in error
    assert "5/5" in error
