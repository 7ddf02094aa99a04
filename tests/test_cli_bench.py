# SPDX-License-Identifier: Apache-2.0
"""`quattuor bench`: which process it starts, and what it refuses."""

import pytest
import torch
from typer.testing import CliRunner

from quattuor import cli, cli_bench


def run(*arguments):
    """Run a command line in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def started(monkeypatch):
    """Return the command lines that would be started; none is."""
    lines = []

    class Done:
        returncode = 0

    def start(line, **_):
        lines.append(line)
        return Done

    monkeypatch.setattr(cli_bench.subprocess, "run", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return lines


def test_kernels_hands_its_options_on(started, tmp_path):
    target = tmp_path / "rows.json"
    done = run("bench", "kernels", "--json", target, "--seconds", 5, "--shapes", "64x128", "--tokens", "1,2")
    assert done.exit_code == 0, done.output
    (line,) = started
    assert line[1:3] == ["-m", "benchmarks.kernels.w4a8"]
    assert line[3:] == ["--seconds", "5.0", "--shapes", "64x128", "--tokens", "1,2", "--json", str(target)]


def test_folders_of_peers_are_handed_on_whole(started, tmp_path):
    done = run("bench", "kernels", "--qqq", tmp_path, "--marlin", tmp_path, "--cutlass", tmp_path / "include")
    assert done.exit_code == 0, done.output
    peers = ["--qqq", str(tmp_path), "--marlin", str(tmp_path), "--cutlass", str(tmp_path / "include")]
    assert started[0][5:] == peers


def test_a_failed_benchmark_fails_the_command(started, monkeypatch):
    class Failed:
        returncode = 3

    monkeypatch.setattr(cli_bench.subprocess, "run", lambda *_, **__: Failed)
    assert run("bench", "kernels").exit_code == 3


def test_without_a_gpu_there_is_a_message(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("bench", "kernels")
    assert done.exit_code == 1
    assert "offers no CUDA kernels to time" in " ".join(done.stderr.split())


def test_outside_a_checkout_there_is_a_message(started, monkeypatch, tmp_path):
    monkeypatch.setattr(cli_bench, "ROOT", tmp_path)
    done = run("bench", "kernels")
    assert done.exit_code == 1
    assert "is in the repository" in " ".join(done.stderr.split())
    assert not started
