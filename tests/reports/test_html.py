# SPDX-License-Identifier: Apache-2.0
"""The HTML report: well-formed, escaped, self-contained, and its chart shows the right numbers."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from quattuor.reports.html import HEIGHT, TOP, WIDTH, error_chart, render, write_html
from quattuor.reports.result import RunResult

VOID = {"meta", "br"}


class _Balance(HTMLParser):
    """Collects text and fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        for _, value in attrs:
            assert "http" not in (value or "") or tag == "svg", f"{tag} refers to {value}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _text(page):
    parser = _Balance()
    parser.feed(page)
    assert not parser.open
    return " ".join(" ".join(parser.text).split())


def test_every_part_is_shown_and_escaped(result):
    page = render(result)
    text = _text(page)
    assert "<script" not in page
    for shown in (
        "tiny & small",
        "folder/<script>alert(1)</script>",
        "Why <b>?",
        "</td><script>",
        "rounded <once>",
    ):
        assert shown in text
    assert "kept <nothing>" in text
    assert "20.000" in text
    assert "1.1500" in text, "the ratio of the perplexities"
    assert "4.500" in text, "the mean bits per weight"
    assert "1.50 GB" in text
    assert "2 dead columns" in text
    assert '"group_size": 64' in text
    assert "8 \N{MULTIPLICATION SIGN} 512 tokens of pydoc, seed 0" in text


def test_parts_without_data_are_left_out():
    page = render(RunResult(command="evaluate", date="d", model="m", model_name="m"))
    assert "Perplexity" not in _text(page)
    assert "<svg" not in page


def test_write_html_writes_the_page(result, tmp_path):
    write_html(result, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == render(result)


def test_the_chart_is_logarithmic_and_in_order(result):
    chart = error_chart(result.quantization.layers)
    assert [series.name for series in chart.series] == ["up_proj", "down_proj"]
    up, down = (series.points for series in chart.series)
    # errors are 1, 2, 3 times 1e-3 and 2e-2: equal ratios are equal distances, larger is higher
    assert up[0].y - up[1].y == pytest.approx(down[0].y - down[1].y, abs=0.2)
    assert up[0].y > up[1].y > up[2].y > down[0].y
    assert [point.x for point in up] == sorted({point.x for point in up})
    assert [tick.label for tick in chart.y_ticks] == ["1e-3", "1e-2", "1e-1"]
    assert up[0].y == chart.y_ticks[0].y
    assert chart.y_ticks[-1].y == TOP
    assert all(0 <= point.x <= WIDTH and 0 <= point.y <= HEIGHT for point in (*up, *down))
    assert up[0].label == "model.layers.0.mlp.up_proj: 1.000e-03"
    assert len(re.findall("<circle", render(result))) == 6


def test_the_chart_leaves_out_layers_without_error(result):
    layers = [dataclasses.replace(layer, error=0.0) for layer in result.quantization.layers]
    assert error_chart(layers) is None
    one = error_chart([*layers, dataclasses.replace(layers[0], error=0.5)])
    assert sum(len(series.points) for series in one.series) == 1
