# SPDX-License-Identifier: Apache-2.0
"""The record of the W4A8 kernels: how the rows of several runs come together, and which are refused."""

import json

import pytest

pytest.importorskip("triton")

from benchmarks.kernels import w4a8
from benchmarks.kernels.appending import existing_rows
from quattuor.errors import InputError
from quattuor.reports.environment import hardware, versions


def row(n, k, m, contender="quattuor", latency_us=1.0):
    return {"n": n, "k": k, "m": m, "contender": contender, "latency_us": latency_us}


def write(file, rows, **changes):
    content = {"hardware": hardware(), "versions": versions(), "rows": rows}
    for part, fields in changes.items():
        content[part] = content[part] | fields
    file.write_text(json.dumps(content))
    return file


def test_a_case_is_replaced_as_a_whole_and_others_stay():
    old = [row(4096, 4096, 1), row(28672, 8192, 16), row(28672, 8192, 16, "qqq"), row(28672, 8192, 1)]
    new = [row(28672, 8192, 16, latency_us=2.0), row(640, 256, 1)]
    assert w4a8.merged(old, new) == [
        row(28672, 8192, 1),
        row(28672, 8192, 16, latency_us=2.0),
        row(4096, 4096, 1),
        row(640, 256, 1),
    ]


def test_rows_of_this_device_are_kept(tmp_path):
    assert existing_rows(tmp_path / "none.json") == []
    assert existing_rows(write(tmp_path / "a.json", [row(8, 16, 1)])) == [row(8, 16, 1)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"hardware": {"gpu": "another"}}, "hardware.gpu"), ({"versions": {"triton": "0.0"}}, "versions.triton")],
)
def test_rows_of_other_devices_and_versions_are_refused(tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        existing_rows(write(tmp_path / "a.json", [row(8, 16, 1)], **changes))


def test_missing_cases_alone_are_measured(tmp_path, monkeypatch):
    file = write(tmp_path / "a.json", [row(8, 16, 1), row(8, 16, 4, latency_us=3.0), row(64, 16, 1)])
    shapes = []
    monkeypatch.setattr(w4a8, "peers_that_run", lambda folders: [])
    monkeypatch.setattr(w4a8, "make_contenders", lambda shape, *_: shapes.append(shape))
    monkeypatch.setattr(w4a8, "measure", lambda _, m, n, k: [row(n, k, m, latency_us=9.0) | {"floor_us": 1.0}])
    monkeypatch.setattr(w4a8, "describe_case", lambda *_: "")
    options = ["--shapes", "8x16,64x16", "--tokens", "1,2", "--append", "--missing", "--json", str(file)]
    w4a8.main(options)
    rows = json.loads(file.read_text())["rows"]
    assert shapes == [(8, 16), (64, 16)]
    assert {w4a8.case_of(found): found["latency_us"] for found in rows} == {
        (8, 16, 1): 1.0,
        (8, 16, 2): 9.0,
        (8, 16, 4): 3.0,
        (64, 16, 1): 1.0,
        (64, 16, 2): 9.0,
    }
    shapes.clear()
    w4a8.main(options)
    assert shapes == [], "nothing is missing"
    with pytest.raises(SystemExit):
        w4a8.main(["--missing"])
