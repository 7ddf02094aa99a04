# SPDX-License-Identifier: Apache-2.0
"""Every example runs as a user would run it, offline, and prints what the docs say it prints."""

import re
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from quattuor.kernels.dispatch import TOKEN_RANGES

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> None:
    """Run an example as a script, without leaving a trace in this process."""
    before = sys.argv
    sys.argv = [name, *arguments]
    try:
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder that the first example writes, and what it prints."""
    folder = tmp_path_factory.mktemp("examples") / "tiny"
    with redirect_stdout(StringIO()) as printed:
        run("quantize_tiny.py", str(folder))
    return folder, printed.getvalue()


def test_quantize_tiny(packed: tuple[Path, str]) -> None:
    folder, printed = packed
    errors = [float(error) for error in re.findall(r"relative error (\S+)", printed)]
    assert len(errors) == 7
    assert all(0 < error < 0.05 for error in errors)
    assert "tensors verified" in printed
    assert re.search(r"continues \[(\d+, ){7}\d+\]", printed)
    assert (folder / "README.md").is_file()


def test_load_and_explain(packed: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    run("load_and_explain.py", str(packed[0]))
    printed = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj: TwoLevelInteger(bits=4) PerGroup(group_size=32)" in printed
    assert printed.count("->") == len(TOKEN_RANGES), "one implementation is chosen for each range of token counts"
    assert "equal to the reference kernel: True" in printed


def test_load_and_explain_without_a_folder() -> None:
    with pytest.raises(SystemExit, match=r"load_and_explain\.py FOLDER"):
        run("load_and_explain.py")


def test_custom_system_beats_rounding(capsys: pytest.CaptureFixture[str]) -> None:
    run("custom_system.py")
    printed = capsys.readouterr().out
    changes = {name: float(change) for name, change in re.findall(r"^(\w+) .* by (\S+)$", printed, re.MULTILINE)}
    assert changes.keys() == {"rtn", "three_bits"}
    assert 0 < changes["three_bits"] < changes["rtn"]


def test_every_example_is_short_and_tested() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert files
    tested = Path(__file__).read_text(encoding="utf-8")
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), file.name
        assert len(text.splitlines()) <= 60, file.name
        assert f'run("{file.name}"' in tested, f"{file.name} has no test"
