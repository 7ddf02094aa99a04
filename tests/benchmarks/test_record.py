# SPDX-License-Identifier: Apache-2.0
"""Records: what is written can be read, and says where it came from; anything else is refused."""

import json
import subprocess

import pytest

from benchmarks import record
from quattuor.errors import InputError

ROWS = [{"system": "qqq", "bits": 4, "perplexity": 23.5, "group_size": None, "is_default": True}]


def test_a_record_reads_back_with_its_origin(tmp_path):
    path = record.write("tiny_accuracy", ROWS, command="python -m benchmarks.tiny", folder=tmp_path)
    assert path == tmp_path / "tiny_accuracy.json"
    written = record.read("tiny_accuracy", folder=tmp_path)
    assert written == json.loads(path.read_text())
    assert list(written) == list(record.FIELDS)
    assert written["rows"] == ROWS
    assert written["command"] == "python -m benchmarks.tiny"
    assert written["hardware"]["cpu"]
    assert written["hardware"]["cpu_cores"] >= 1
    assert written["hardware"]["memory_bytes"] > 1e8
    assert {"python", "torch", "transformers", "quattuor"} <= set(written["versions"])
    assert [item.name for item in tmp_path.iterdir()] == ["tiny_accuracy.json"]


def test_a_record_may_go_to_a_file_of_another_name(tmp_path):
    target = tmp_path / "new" / "mine.json"
    assert record.write("tiny_accuracy", ROWS, folder=tmp_path / "unused", to=target) == target
    assert json.loads(target.read_text())["rows"] == ROWS
    assert [item.name for item in tmp_path.rglob("*")] == ["new", "mine.json"]


def test_the_commit_is_that_of_the_checkout_and_says_when_it_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@t")
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    (tmp_path / "code.py").write_text("1\n")
    results = tmp_path / "benchmarks" / "results"
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.read(record.write("a", ROWS, folder=results).stem, folder=results)["commit"] == "unknown"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    record.write("a", [{"bits": 8}], folder=results)
    clean = record.read("a", folder=results)["commit"]
    assert clean == git("rev-parse", "HEAD"), "a changed record does not make the code that measured it dirty"
    (tmp_path / "code.py").write_text("2\n")
    record.write("a", ROWS, folder=results)
    assert record.read("a", folder=results)["commit"] == clean + "-dirty"


def test_the_command_is_this_process_by_default(tmp_path, monkeypatch):
    script = f"{record.ROOT}/benchmarks/tiny.py"
    arguments = [script, "--json", "/elsewhere/a.json", "--name", "two words"]
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", *arguments])
    record.write("a", ROWS, folder=tmp_path)
    assert record.read("a", folder=tmp_path)["command"] == "python benchmarks/tiny.py --name 'two words'"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no measurement"),
        ([{"bits": 4}, {}], "row 1"),
        ([{"bits": 4}, {"seconds": float("nan")}], "row 1: seconds=nan is not finite"),
        ([{"shape": (2, 3)}], "shape=tuple is not a string, number, boolean or None"),
        ([{"layers": {"a": 1}}], "flatten the row"),
        ([{"Bits": 4}], "key=Bits"),
        ([{3: 4}], "key=3"),
    ],
)
def test_rows_that_are_not_flat_are_refused(tmp_path, rows, message):
    with pytest.raises(InputError) as error:
        record.write("a", rows, folder=tmp_path)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["A", "../a", "a-b", ""])
def test_names_are_words(tmp_path, name):
    with pytest.raises(InputError, match="name="):
        record.write(name, ROWS, folder=tmp_path)


def test_reading_what_is_not_a_record_is_refused(tmp_path):
    record.write("known", ROWS, folder=tmp_path)
    with pytest.raises(InputError, match="use one of those there: known"):
        record.read("unknown", folder=tmp_path)
    (tmp_path / "short.json").write_text('{"rows": [{"bits": 4}]}')
    with pytest.raises(InputError, match="lacks command, commit, date, hardware, versions"):
        record.read("short", folder=tmp_path)
