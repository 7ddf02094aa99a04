# SPDX-License-Identifier: Apache-2.0
"""Results survive JSON exactly, and anything that is not one is refused with its place."""

import json

import pytest

from quattuor.errors import InputError
from quattuor.quantize import LayerReport
from quattuor.recipe import Recipe
from quattuor.reports.result import RunResult, format_bytes, mean_bits_per_weight, now, site_errors
from quattuor.systems import qqq


def _layer(name, num_weights, bits_per_weight, error):
    return LayerReport(
        name=name,
        number_format="Integer(bits=4)",
        granularity="PerChannel()",
        num_weights=num_weights,
        bits_per_weight=bits_per_weight,
        error=error,
        seconds=0.0,
    )


def test_a_result_survives_json_exactly(result):
    again = RunResult.from_json(result.to_json())
    assert again == result
    assert again.quantization.layers[0] == result.quantization.layers[0]
    assert Recipe.from_dict(again.recipe) == qqq(group_size=64)
    assert again.systems == ("qqq",)


def test_a_result_without_a_run_survives_json():
    plain = RunResult(command="evaluate", date=now(), model="m", model_name="m")
    assert RunResult.from_json(plain.to_json()) == plain
    assert plain.systems == ()


def test_a_written_result_reads_back(result, tmp_path):
    result.write(tmp_path / "report.json")
    assert RunResult.from_json((tmp_path / "report.json").read_text()) == result


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model",), 3, "result.model: model=3 is not str"),
        (("calibration", "seed"), "0", "result.calibration.seed: seed=0 is not int"),
        (("calibration", "seed"), True, "result.calibration.seed: seed=True is not int"),
        (("evaluations", 1, "perplexity"), [], "result.evaluations[1].perplexity"),
        (("extra",), 1, "result: field=extra is no field of RunResult"),
        (("hardware", "cpu"), None, "is not str or int"),
    ],
)
def test_wrong_data_says_where(result, path, value, message):
    data = json.loads(result.to_json())
    *parents, last = path
    target = data
    for key in parents:
        target = target[key]
    target[last] = value
    with pytest.raises(InputError) as error:
        RunResult.from_dict(data)
    assert message in str(error.value)


def test_a_missing_field_says_where(result):
    data = json.loads(result.to_json())
    del data["generations"][0]["result"]["seconds"]
    with pytest.raises(InputError, match=r"generations\[0\]\.result: field=seconds is missing"):
        RunResult.from_dict(data)
    with pytest.raises(InputError, match="is not JSON"):
        RunResult.from_json("{")


def test_means_weigh_layers_by_their_size():
    layers = [_layer("m.layers.0.up", 100, 4.0, 0.1), _layer("m.layers.1.up", 300, 8.0, 0.3)]
    assert mean_bits_per_weight(layers) == pytest.approx((400 + 2400) / 400)
    assert site_errors([*layers, _layer("m.layers.0.down", 1, 4.0, 0.5)]) == pytest.approx(
        {"up": 0.2, "down": 0.5}
    )


def test_sizes_are_decimal():
    assert format_bytes(1_500_000_000) == "1.50 GB"
    assert format_bytes(12_340_000) == "12.3 MB"
