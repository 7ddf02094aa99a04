# SPDX-License-Identifier: Apache-2.0
"""How latencies are set beside those of peers."""

from benchmarks.kernels.ratios import ratios


def row(contender, granularity, latency_us, quantizes=False):
    """One row as the benchmark writes it."""
    return {
        "n": 64,
        "k": 128,
        "m": 16,
        "contender": contender,
        "granularity": granularity,
        "includes_activation_quantization": quantizes,
        "implementation": None,
        "latency_us": latency_us,
        "floor_us": 1.0,
        "fraction_of_floor": 1.0 / latency_us,
    }


ROWS = [
    row("cublas_fp16", "none", 12.0),
    row("cublas_fp8", "channel", 6.0),
    row("cublas_fp8", "channel", 8.0, quantizes=True),
    row("cublas_int8", "channel", 11.0),
    row("cutlass_int8", "channel", 5.5),
    row("cutlass_int8", "channel", 7.5, quantizes=True),
    row("w4a16_humming", "group128", 9.0),
    row("w4a16_marlin", "group128", 9.5),
    row("w4a16_quattuor", "group128", 7.0),
    row("humming_w4a8", "channel", 3.0),
    row("humming_w4a8", "channel", 5.0, quantizes=True),
    row("humming_w4a8", "group128", 6.5),
    row("quattuor", "channel", 4.0),
    row("quattuor", "channel", 4.5, quantizes=True),
    row("quattuor", "group128", 5.0),
    row("quattuor", "group128_float", 9.0),
]


def test_each_kind_is_stood_for_by_its_fastest_of_the_same_granularity():
    found = {(item["granularity"], item["with_quantization"]): item for item in ratios(ROWS)}
    assert set(found) == {("channel", False), ("channel", True), ("group128", False)}
    plain, quantized, group = found["channel", False], found["channel", True], found["group128", False]
    assert (plain["fp16_us"], plain["fp8_us"], plain["w4a16_us"], plain["humming_us"]) == (12.0, 6.0, 7.0, 3.0)
    assert (plain["int8_us"], plain["over_int8"], quantized["int8_us"]) == (5.5, 1.38, 7.5)
    assert (plain["qqq_us"], plain["over_qqq"]) == (None, None)
    assert (plain["over_fp16"], plain["fastest_peer"], plain["is_ahead"]) == (3.0, "humming", False)
    assert (quantized["fp16_us"], quantized["fp8_us"], quantized["humming_us"]) == (12.0, 8.0, 5.0)
    assert (quantized["over_fastest_peer"], quantized["is_ahead"]) == (1.11, True)
    assert (group["humming_us"], group["of_channel_speed"], group["fastest_peer"]) == (6.5, 0.8, "int8")
