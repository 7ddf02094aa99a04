# SPDX-License-Identifier: Apache-2.0
"""Tables of pages equal their records, and the check notices when they do not."""

import pytest

from benchmarks import record, report
from quattuor.errors import InputError

PAGE = """# Results

<!-- record: tiny columns=system,bits,perplexity:.2f where=is_default:yes -->
old
<!-- /record -->

Text stays.
"""
FILLED = """# Results

<!-- record: tiny columns=system,bits,perplexity:.2f where=is_default:yes -->
| system | bits | perplexity |
| --- | ---: | ---: |
| qqq | 4 | 23.46 |
| a\\|b | 8 | - |
<!-- /record -->

Text stays.
"""


@pytest.fixture
def results(tmp_path, monkeypatch):
    rows = [
        {"system": "qqq", "bits": 4, "perplexity": 23.456, "is_default": True},
        {"system": "rtn", "bits": 4, "perplexity": 45.0, "is_default": False},
        {"system": "a|b", "bits": 8, "perplexity": None, "is_default": True},
    ]
    folder = tmp_path / "results"
    record.write("tiny", rows, folder=folder)
    return folder


def test_a_marker_is_filled_and_nothing_else_changes(results):
    assert report.fill(PAGE, page="p.md", folder=results) == FILLED
    assert report.fill(FILLED, page="p.md", folder=results) == FILLED


def test_without_options_every_row_and_column_is_shown(results):
    filled = report.fill("<!-- record: tiny -->\n<!-- /record -->", page="p.md", folder=results)
    assert filled.count("\n") == 6
    assert "| system | bits | perplexity | is default |" in filled
    assert "| rtn | 4 | 45.0 | no |" in filled


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("<!-- record: tiny columns=perplexty -->\n<!-- /record -->", "did you mean perplexity?"),
        ("<!-- record: tiny where=bits:3 -->\n<!-- /record -->", "matches no row"),
        ("<!-- record: tiny column=bits -->\n<!-- /record -->", "option=column"),
        ("<!-- record: other -->\n<!-- /record -->", "record=other does not exist"),
        ("<!-- record: tiny -->\n| a |", "is not closed"),
        ("<!-- record: tiny -->\n<!-- record: tiny -->\n<!-- /record -->", "is not closed"),
    ],
)
def test_malformed_markers_are_input_errors(results, marker, message):
    with pytest.raises(InputError) as error:
        report.fill(marker, page="p.md", folder=results)
    assert message in str(error.value)


def test_check_notices_a_difference_and_writes_nothing(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "fill", lambda text, page, fill=report.fill: fill(text, page=page, folder=results))
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert report.main(["--check", str(page)]) == 1
    assert "differs from its records" in capsys.readouterr().out
    assert page.read_text() == PAGE
    assert report.main([str(page)]) == 0
    assert page.read_text() == FILLED
    assert report.main(["--check", str(page)]) == 0
    page.write_text(FILLED.replace("23.46", "22.46"))
    assert report.main(["--check", str(page)]) == 1


def test_a_broken_page_fails_the_command(tmp_path, capsys):
    page = tmp_path / "page.md"
    assert report.main([str(page)]) == 1
    assert "does not exist" in capsys.readouterr().err
