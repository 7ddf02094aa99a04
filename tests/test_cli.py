# SPDX-License-Identifier: Apache-2.0
"""Every command on a tiny model: exit status, standard output, JSON, and the messages of wrong input."""

import json
import math

import pytest
from safetensors.torch import load_file
from tiny_models import save_tiny
from typer.testing import CliRunner

from quattuor import cli
from quattuor.recipe import Recipe
from quattuor.reports.result import RunResult
from quattuor.systems import SYSTEMS, qqq

CALIBRATION = ("--data", "pydoc", "--samples", "4", "--length", "32")


def run(*arguments):
    """Run a command line in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def fails(*arguments, status=1):
    """Run a command line that must fail with a message; return the message, its line breaks removed."""
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("original") / "llama", "llama")


@pytest.fixture(scope="module")
def quantized(original, tmp_path_factory):
    """Return (folder, JSON file, the command's result) of one quantization."""
    folder = tmp_path_factory.mktemp("quantized")
    done = run(
        *("quantize", original, "--system", "qqq", "--set", "group_size=32", "--set", "rotation=false"),
        *(*CALIBRATION, "--seed", "3", "-o", folder / "model", "--json", folder / "run.json"),
    )
    assert done.exit_code == 0, done.output
    return folder / "model", folder / "run.json", done


def test_systems_lists_every_system_and_setting(tmp_path):
    done = run("systems", "--json", tmp_path / "s.json")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in SYSTEMS)
    rows = {row["name"]: row for row in json.loads((tmp_path / "s.json").read_text())["systems"]}
    assert list(rows) == list(SYSTEMS)
    assert rows["qqq"]["settings"]["group_size"] == {"type": "int or None", "default": None}
    assert rows["qqq"]["summary"].startswith("QQQ")


def test_quantize_writes_a_checkpoint_and_its_result(quantized, original):
    folder, json_file, done = quantized
    result = RunResult.from_json(json_file.read_text())
    assert (folder / "config.json").is_file()
    assert Recipe.from_dict(result.recipe) == qqq(group_size=32, rotation=False)
    assert (result.calibration.num_tokens, result.calibration.seed) == (128, 3)
    assert len(result.quantization.layers) == 14
    assert all(0 < layer.error < 1 for layer in result.quantization.layers)
    assert "written to" in done.stdout
    assert "blocks" in done.stderr, "progress belongs on standard error"
    assert "2/2" in done.stderr
    assert "2/2" not in done.stdout


def test_the_same_command_gives_the_same_bits(quantized, original, tmp_path):
    folder, *_ = quantized
    arguments = ("--system", "qqq", "--set", "group_size=32", "--set", "rotation=False", *CALIBRATION)
    done = run("quantize", original, *arguments, "--seed", 3, "-o", tmp_path / "again")
    assert done.exit_code == 0, done.output
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_evaluate_measures_both_models_alike(quantized, original, tmp_path):
    perplexities = []
    for model in (original, quantized[0]):
        done = run("evaluate", model, "--length", 64, "--limit", 3, "--json", tmp_path / "e.json")
        assert done.exit_code == 0, done.output
        result = RunResult.from_json((tmp_path / "e.json").read_text())
        (measured,) = result.evaluations
        assert measured.label == ("original" if model is original else "quantized")
        assert (measured.perplexity.num_windows, measured.perplexity.length) == (3, 64)
        assert f"{measured.perplexity.perplexity:.3f}" in done.stdout
        perplexities.append(measured.perplexity.perplexity)
    assert perplexities[0] != perplexities[1]
    assert abs(math.log(perplexities[1] / perplexities[0])) < 0.5


def test_generate_prints_the_text(quantized, tmp_path):
    done = run("generate", quantized[0], "--prompt", "Once", "--max-new-tokens", 5, "--json", tmp_path / "g.json")
    assert done.exit_code == 0, done.output
    (written,) = RunResult.from_json((tmp_path / "g.json").read_text()).generations
    assert written.result.num_new_tokens <= 5
    assert "Once" in done.stdout


def test_inspect_lists_layers_with_measured_bits(quantized, tmp_path):
    done = run("inspect", quantized[0], "--json", tmp_path / "i.json")
    assert done.exit_code == 0, done.output
    layers = json.loads((tmp_path / "i.json").read_text())["layers"]
    assert len(layers) == 14
    # 4 bits, an 8-bit group scale per 32 weights, a 32-bit scale per row of 64 or 192 weights
    by_name = {layer["name"]: layer for layer in layers}
    assert by_name["model.layers.0.self_attn.q_proj"]["bits_per_weight"] == pytest.approx(4 + 8 / 32 + 32 / 64)
    assert by_name["model.layers.0.mlp.down_proj"]["bits_per_weight"] == pytest.approx(4 + 8 / 32 + 32 / 192)
    assert "model.layers.1.mlp.down_proj" in done.stdout


def test_verify_passes_and_notices_a_changed_byte(quantized, original, tmp_path):
    folder, *_ = quantized
    done = run("verify", folder, "--against", original, "--json", tmp_path / "v.json")
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "v.json").read_text())
    assert summary["num_tensors"] == len(summary["rows"])
    assert summary["checks"]["hash"] == summary["num_tensors"]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    assert "SHA-256" in fails("verify", damaged)


def test_a_recipe_file_adds_rules_to_a_system(original, tmp_path):
    rules = {"rules": [{"part": "Rule", "pattern": "*.down_proj", "skip": True}]}
    (tmp_path / "rules.yaml").write_text(json.dumps(rules))
    arguments = ("--system", "rtn", "--set", "group_size=32", "--recipe", tmp_path / "rules.yaml", *CALIBRATION)
    done = run("quantize", original, *arguments, "-o", tmp_path / "out", "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    names = [layer.name for layer in RunResult.from_json((tmp_path / "r.json").read_text()).quantization.layers]
    assert len(names) == 12
    assert not any(name.endswith("down_proj") for name in names)


def test_a_recipe_from_a_report_is_run_again(quantized, original, tmp_path):
    folder, json_file, _ = quantized
    (tmp_path / "recipe.yaml").write_text(json.dumps(json.loads(json_file.read_text())["recipe"]))
    arguments = ("--recipe", tmp_path / "recipe.yaml", *CALIBRATION, "--seed", 3, "-o", tmp_path / "again")
    done = run("quantize", original, *arguments)
    assert done.exit_code == 0, done.output
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert all(first[name].equal(second[name]) for name in first)


def test_without_transforms_drops_them(original, tmp_path):
    arguments = ("--system", "qqq", "--without-transforms", *CALIBRATION, "-o", tmp_path / "out")
    done = run("quantize", original, *arguments, "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "r.json").read_text())["recipe"]["transforms"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--system", "qq"), "did you mean qqq?"),
        (("--system", "qqq", "--set", "group=32"), "did you mean group_size?; keys with defaults: bits=4"),
        (("--system", "qqq", "--set", "group_size=many"), "group_size=many is str, not int or None"),
        (("--system", "qqq", "--set", "group_size"), "write group_size=VALUE"),
        (("--system", "qqq", "--set", "group_size=48"), "group_size=48 does not divide"),
        ((), "--recipe are both missing"),
        (("--system", "rtn", "--data", "wikitext"), "did you mean wikitext2?"),
        (("--system", "rtn", "--data", "missing.txt"), "is not an existing file"),
        (("--system", "rtn", "--length", "257"), "longer than the 256 positions"),
        (("--system", "rtn", "--device", "cuda:99"), "device=cuda:99"),
        (("--system", "rtn", "--device", "gpu"), "use auto, cpu, cuda or cuda:1"),
        (("--recipe", "missing.yaml"), "recipe=missing.yaml cannot be read"),
        (("--system", "rtn", "--json", "missing/run.json"), "file=missing/run.json is not in an existing folder"),
    ],
)
def test_wrong_input_exits_with_one_and_a_remedy(original, tmp_path, arguments, message):
    said = fails("quantize", original, "-o", tmp_path / "out", *CALIBRATION, *arguments)
    assert message in said
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*")), "a failed run leaves nothing behind"


def test_an_existing_output_folder_is_refused_or_replaced(original, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    arguments = ("quantize", original, "--system", "rtn", "--set", "group_size=32", *CALIBRATION)
    assert "exists already" in fails(*arguments, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()
    assert run(*arguments, "--overwrite", "-o", tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out" / "precious").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "{missing}", "--system", "rtn", "-o", "{out}"), "model="),
        (("quantize", "{quantized}", "--system", "rtn", "-o", "{out}"), "is quantized already"),
        (("evaluate", "{missing}"), "model="),
        (("evaluate", "{original}", "--length", "512"), "longer than the 256 positions"),
        (("evaluate", "{original}", "--data", "{short}", "--length", "64"), "too short for one window"),
        (("generate", "{original}", "--prompt", ""), "has no tokens"),
        (("generate", "{original}", "--prompt", "Hi", "--chat"), "chat template"),
        (("verify", "{quantized}", "--against", "{missing}"), "model="),
        (("verify", "{original}"), "{original}"),
        (("inspect", "{original}"), "{original}"),
    ],
)
def test_wrong_models_and_folders_exit_with_one(original, quantized, tmp_path, arguments, message):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    places = {"original": original, "quantized": quantized[0], "short": short, "out": tmp_path / "out"}
    places["missing"] = tmp_path / "missing" / "model"
    said = fails(*(argument.format(**places) for argument in arguments))
    assert message.format(**places) in said


@pytest.mark.parametrize(
    "arguments", [(), ("quantise",), ("quantize", "m"), ("evaluate", "m", "--limit", "x"), ("generate", "m")]
)
def test_wrong_usage_exits_with_two(arguments):
    assert run(*arguments).exit_code == 2


def test_an_interrupt_exits_with_130_and_leaves_nothing(original, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("quattuor.calibration.blockwise.BlockRunner.run", interrupt)
    arguments = ("quantize", original, "--system", "rtn", "--set", "group_size=32", *CALIBRATION)
    said = fails(*arguments, "-o", tmp_path / "out", status=130)
    assert "Interrupted" in said
    assert not list(tmp_path.iterdir())


def test_help_names_every_command():
    done = run("--help")
    assert done.exit_code == 0
    for command in ("systems", "quantize", "evaluate", "generate", "inspect", "verify", "demo"):
        assert command in done.stdout
