# SPDX-License-Identifier: Apache-2.0
"""Where texts come from, and what each wrong source says."""

import sys
from types import SimpleNamespace

import pytest

from quattuor.calibration.sources import HUB_TEXTS, SHORTEST_SHARED_PARAGRAPH, load_text
from quattuor.errors import CalibrationError, InputError, UnsupportedError


def _paragraphs(text: str) -> list[str]:
    normalized = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return [paragraph for paragraph in normalized if len(paragraph) >= SHORTEST_SHARED_PARAGRAPH]


def test_pydoc_splits_share_no_paragraph():
    calibration, evaluation = (_paragraphs(load_text("pydoc", split)) for split in ("calibration", "evaluation"))
    assert not set(calibration) & set(evaluation)
    assert len(set(calibration)) == len(calibration)
    assert len(set(evaluation)) == len(evaluation)


def test_pydoc_is_deterministic_and_large_enough():
    calibration, evaluation = load_text("pydoc", "calibration"), load_text("pydoc", "evaluation")
    assert load_text("pydoc", "calibration") == calibration
    assert len(evaluation) > 60_000
    assert 2 < len(calibration) / len(evaluation) < 5


def test_txt_is_taken_as_is(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" one\n\n\ntwo \n", encoding="utf-8")
    assert load_text(path, "calibration") == load_text(str(path), "evaluation") == " one\n\n\ntwo \n"


def test_jsonl_joins_documents_with_blank_lines(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one\\u2028two"}\n\n{"text": "three", "id": 3}\n', encoding="utf-8")
    assert load_text(path, "calibration") == "one\u2028two\n\nthree"


@pytest.mark.parametrize(
    ("line", "constraint"),
    [
        ('{"body": "three"}', 'has no string in a field "text"'),
        ('{"text": 3}', 'has no string in a field "text"'),
        ('["three"]', 'has no string in a field "text"'),
        ('{"text": "thr', "is not JSON"),
    ],
)
def test_jsonl_names_the_line_without_text(tmp_path, line, constraint):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 3") as error:
        load_text(path, "calibration")
    assert constraint in str(error.value)


def test_parquet_reads_the_text_column(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "text.parquet"
    parquet.write_table(arrow.table({"text": ["one", "two"], "id": [1, 2]}), path)
    assert load_text(path, "calibration") == "one\n\ntwo"
    parquet.write_table(arrow.table({"body": ["one"]}), path)
    with pytest.raises(InputError, match='no column "text"'):
        load_text(path, "calibration")
    parquet.write_table(arrow.table({"text": ["one", None]}), path)
    with pytest.raises(InputError, match="row 1: row=None"):
        load_text(path, "calibration")
    path.write_bytes(b"PAR1 cut short")
    with pytest.raises(InputError, match="is not a parquet file"):
        load_text(path, "calibration")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikitext", "did you mean wikitext2?"),
        ("pydocs", "did you mean pydoc?"),
        ("nothing-like-it", "use pydoc, which needs no network"),
        ("text.csv", ".txt, .jsonl, .parquet"),
        ("missing.txt", "is not an existing file"),
    ],
)
def test_unknown_sources_are_input_errors(source, message):
    with pytest.raises(InputError) as error:
        load_text(source, "calibration")
    assert message in str(error.value)
    assert source in str(error.value)


@pytest.mark.parametrize("content", ["", " \n\n\t"])
def test_an_empty_text_is_a_calibration_error(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(CalibrationError, match="is empty") as error:
        load_text(path, "calibration")
    assert "empty.txt" in str(error.value)


def test_a_file_that_is_not_utf8_names_the_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="byte=0xe9 at position 3"):
        load_text(path, "calibration")


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r'pip install "quattuor\[hub\]"'):
        load_text("wikitext2", "calibration")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = tmp_path / "text.parquet"
    path.touch()
    with pytest.raises(UnsupportedError, match=r'pip install "quattuor\[parquet\]"'):
        load_text(path, "calibration")


def test_a_missing_network_is_named(monkeypatch):
    def load_dataset(*_args, **_keywords):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CalibrationError, match="offline source pydoc") as error:
        load_text("c4", "evaluation")
    assert "Couldn't reach the Hub" in str(error.value)


def test_hub_documents_are_chosen_and_joined_as_published(monkeypatch):
    asked = []

    def load_dataset(path, name, *, data_files, split, streaming):
        asked.append((path, name, data_files, split, streaming))
        return ({"text": f"d{index}"} for index in range(6000))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_text("c4", "evaluation").split(" ") == [f"d{index}" for index in range(1100)]
    assert load_text("wikitext2", "evaluation").startswith("d0\n\nd1")
    calibration, evaluation = (load_text("pile", split).split("\n\n") for split in ("calibration", "evaluation"))
    assert not set(calibration) & set(evaluation)
    assert ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", True) in asked
    assert {row[0] for row in asked} == {source.path for source in HUB_TEXTS.values()}
