# SPDX-License-Identifier: Apache-2.0
"""A report's file is complete or absent."""

import json
import os

import pytest

from quattuor.errors import InputError
from quattuor.reports import files


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_unwritable_places_are_known_before_the_work(tmp_path):
    files.check_writable(None)
    files.check_writable(tmp_path / "new.json")
    with pytest.raises(InputError, match="is a folder"):
        files.check_writable(tmp_path)
    with pytest.raises(InputError, match="not in an existing folder"):
        files.check_writable(tmp_path / "missing" / "new.json")
    with pytest.raises(InputError, match="cannot be written"):
        files.write_json(tmp_path / "missing" / "new.json", {})


def test_no_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_json(None, {"a": 1})
    assert not os.listdir(tmp_path)
