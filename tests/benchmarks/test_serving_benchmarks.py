# SPDX-License-Identifier: Apache-2.0
"""The serving benchmarks: their configurations are complete, and their arithmetic is right; no engine runs."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from benchmarks.end_to_end import serve_equality, serve_plots, serve_vllm, serve_worker
from benchmarks.end_to_end.serving_formats import FORMATS, SHAPES, model_config
from quattuor.checkpoints.layouts import read_layouts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["quattuor_w4a8", "quattuor_w4a8_g128", "quattuor_w4a16"])
def test_ours_quantizes_every_linear_of_the_blocks(shape: str, name: str, tmp_path: Path) -> None:
    config = model_config(shape, name)
    layouts = read_layouts(config)
    assert all((layout.activations is None) is (name == "quattuor_w4a16") for layout in layouts.values())
    assert len(layouts) == 7 * config["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == config["num_hidden_layers"]


def test_only_fp16_is_not_quantized() -> None:
    methods = {name: model_config("llama-2-13b", name).get("quantization_config") for name in FORMATS}
    assert [name for name, method in methods.items() if method is None] == ["fp16"]
    assert (methods["w4a8_humming"]["a_dtype"], methods["w4a8_humming"]["b_dtype"]) == ("int8", "int4")
    for name in ("w8a8", "fp8"):
        group = methods[name]["config_groups"]["group_0"]
        assert group["format"] == methods[name]["format"]
        assert group["input_activations"]["dynamic"] is True


def test_only_eight_bit_keys_and_values_take_bfloat16() -> None:
    for name, form in FORMATS.items():
        wanted = "bfloat16" if form.kv_cache_dtype == "fp8" else "float16"
        assert model_config("llama-2-13b", name)["torch_dtype"] == form.dtype == wanted


def test_gptq_names_its_layers_since_random_weights_have_no_file() -> None:
    for name in ("w4a16", "w4a8_marlin"):
        config = model_config("llama-2-13b", name)["quantization_config"]
        assert set(config["modules_in_block_to_quantize"]) == {
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        }


def event(name: str, microseconds: float, category: str = "kernel") -> dict[str, object]:
    return {"name": name, "dur": microseconds, "cat": category}


def test_a_decode_step_is_the_difference_of_two_runs() -> None:
    prefill = [event("void gemm<128>(float*)", 900.0), event("norm", 5.0)]
    steps = [event("void gemm<8>(float*)", 10.0), event("norm", 1.0), event("norm", 3.0)] * 2
    rows = serve_worker.decode_kernels(
        [*prefill, event("copy", 1.0, "gpu_memcpy")], [*prefill, *steps], num_steps=2
    )
    assert rows == [
        {"kernel": "gemm", "calls": 1.0, "time_us": 10.0},
        {"kernel": "norm", "calls": 2.0, "time_us": 4.0},
    ]


def test_the_first_divergence_of_each_prompt_counts() -> None:
    exact = {"tokens": [[4, 4]] * 3, "gaps": [[0.0, 0.0], [0.0, 0.25], [0.125, 3.0]], "losses": [1.0, 2.0]}
    rounded = {"tokens": [[4, 4]] * 3, "gaps": [[0.0, 0.0], [0.0, 0.0], [0.5, 0.0]], "losses": [1.0, 1.8]}
    served, rounding, *divergences = serve_equality.compare("m", {"losses": [1.0, 2.2]}, exact, rounded)
    assert (served["row"], served["identical_prompts"], served["new_tokens"]) == ("served", 1, 6)
    assert served["agreeing_share"] == pytest.approx(0.5)
    assert (served["median_logit_gap"], served["largest_logit_gap"]) == (0.25, 3.0)
    assert served["relative_difference"] == pytest.approx(math.exp(0.1) - 1)
    assert (rounding["row"], rounding["identical_prompts"]) == ("rounding", 2)
    assert rounding["agreeing_share"] == pytest.approx(5 / 6)
    assert rounding["relative_difference"] == pytest.approx(math.exp(-0.1) - 1)
    assert [(row["prompt"], row["token"], row["logit_gap"]) for row in divergences] == [
        (1, 1, 0.25),
        (2, 0, 0.125),
    ]


def test_a_model_is_read_twice_and_rounding_moves_it_little(tiny: Callable[[str], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = tiny("llama").eval()
    texts = {"prompts": [[1, 2, 3], [4, 5, 6]], "windows": [[7, 8, 9, 10]]}
    new_tokens = [[11, 12], [13, 14]]
    exact = serve_equality.read(model, texts, new_tokens, new_tokens)
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3, 11, 12]])).logits[0, 2:-1]
    assert exact["tokens"][0] == logits.argmax(dim=1).tolist()
    gap = logits.max(dim=1).values - logits[torch.arange(2), torch.tensor([11, 12])]
    assert exact["gaps"][0] == pytest.approx(gap.tolist())
    assert len(exact["losses"]) == 3
    again = serve_equality.read(model, texts, new_tokens, exact["tokens"])
    assert again["gaps"] == [[0.0, 0.0], [0.0, 0.0]]
    serve_equality.disturb_norms(model)
    rounded = serve_equality.read(model, texts, new_tokens, exact["tokens"])
    assert rounded["losses"] != exact["losses"]
    assert rounded["losses"] == pytest.approx(exact["losses"], rel=1e-2)


def test_rows_are_recorded_as_they_come_and_a_silent_format_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys, time\n"
        "name = sys.argv[sys.argv.index('--worker') + 1]\n"
        "if name == 'fp16':\n"
        "    print('INFO Model loading took 24.29 GiB and 1.5 seconds')\n"
        '    print(\'ROW {"shape": "llama-2-13b", "format": "fp16", "batch": 1}\', flush=True)\n'
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(serve_vllm, "_COMMAND", (sys.executable, str(worker)))
    target = tmp_path / "serve.json"
    status = serve_vllm.main(["--formats", "fp16,w8a8", "--timeout", "2", "--json", str(target)])
    assert status == 1
    row = {"shape": "llama-2-13b", "format": "fp16", "batch": 1, "weights_gib": 24.29}
    assert json.loads(target.read_text())["rows"] == [row]
    assert serve_vllm.main(["--formats", "w8a8", "--append", "--timeout", "1", "--json", str(target)]) == 1
    assert json.loads(target.read_text())["rows"] == [row]
    assert serve_vllm.main(["--formats", "fp16", "--append", "--timeout", "2", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["rows"] == [row]


def test_a_slow_start_takes_no_time_from_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import time\n"
        "time.sleep(1.5)\n"
        "print('fp16: engine ready after 1.5 s', flush=True)\n"
        "time.sleep(1.5)\n"
        'print(\'ROW {"shape": "llama-2-13b", "format": "fp16", "batch": 1}\', flush=True)\n'
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(serve_vllm, "_COMMAND", (sys.executable, str(worker)))
    target = tmp_path / "serve.json"
    assert serve_vllm.main(["--formats", "fp16", "--timeout", "2.5", "--json", str(target)]) == 0
    assert len(json.loads(target.read_text())["rows"]) == 1


def test_engines_warm_up_side_by_side_and_a_stuck_one_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys, time\nif '--only-start' in sys.argv:\n    time.sleep(60 if 'w8a8' in sys.argv else 0.2)\n"
    )
    monkeypatch.setattr(serve_vllm, "_COMMAND", (sys.executable, str(worker)))
    target = tmp_path / "serve.json"
    options = ["--formats", "fp16,w8a8", "--warm", "--timeout", "3", "--json", str(target)]
    assert serve_vllm.main(options) == 1
    assert not target.exists()
    printed = capsys.readouterr().out
    assert "fp16: warm, exit status 0" in printed
    assert "w8a8: warm, exit status -9" in printed


def test_settings_differ_between_formats_in_nothing_but_the_cache(tmp_path: Path) -> None:
    parser = serve_vllm._parser()
    arguments = [parser.parse_args(["--worker", name, "--batches", "1,16"]) for name in FORMATS]
    settings = [serve_worker.settings(tmp_path, options) for options in arguments]
    caches = {name: one.pop("kv_cache_dtype") for name, one in zip(FORMATS, settings, strict=True)}
    assert {name for name, cache in caches.items() if cache != "auto"} == {"quattuor_w4a8_kv8", "fp8_kv8"}
    dtypes = {name: one.pop("dtype") for name, one in zip(FORMATS, settings, strict=True)}
    assert dtypes == {name: form.dtype for name, form in FORMATS.items()}
    assert all(one == settings[0] for one in settings)
    assert settings[0]["compilation_config"]["cudagraph_capture_sizes"] == [1, 16, 1024]


def timed(name: str, batch: int, seconds: float) -> dict[str, object]:
    place = {"shape": "llama-2-13b", "devices": 1, "format": name, "batch": batch}
    return {**place, "end_to_end_s": seconds, "prefill_s": seconds / 4}


def test_ratios_need_our_format_and_another() -> None:
    rows = [timed("quattuor_w4a8", 1, 0.5), timed("fp16", 1, 1.0), timed("fp8", 1, 0.75)]
    rows += [timed("quattuor_w4a8", 16, 1.0), timed("fp16", 64, 5.0)]
    case = {"shape": "llama-2-13b", "batch": 1, "devices": 1, "ours_s": 0.5}
    assert serve_plots.ratios(rows) == [{**case, "fp16_over_ours": 2.0, "fp8_over_ours": 1.5}]


def test_every_kernel_of_a_step_belongs_to_one_part(tmp_path: Path) -> None:
    names = [
        "w4a8_kernel",
        "w4a8_hopper_kernel",
        "cutlass::device_kernel",
        "triton_red_fused_add_rms_norm",
        "copy",
    ]
    place = {"shape": "llama-2-13b", "format": "quattuor_w4a8_compiler", "batch": 1}
    rows = [{**place, "kernel": name, "calls": 1.0, "time_us": 2.0} for name in names]
    parts = serve_plots.time_by_part(rows)
    assert parts == {"linears": 4.0, "attention": 2.0, "norm, gate, quantization": 2.0, "the rest": 2.0}
    serve_plots.draw_steps([*rows, {**rows[0], "format": "quattuor_w4a8"}], tmp_path / "steps.svg")
    serve_plots.draw_seconds([timed("quattuor_w4a8", 1, 0.5), timed("fp16", 1, 1.0)], tmp_path / "seconds.svg")
    steps, seconds = ((tmp_path / f"{name}.svg").read_text(encoding="utf-8") for name in ("steps", "seconds"))
    assert "<!-- Quattuor W4A8, fused by the compiler -->" in steps
    assert "<!-- Quattuor W4A8 -->" not in steps
    assert "<!-- Quattuor W4A8 -->" in seconds
