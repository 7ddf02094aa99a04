# SPDX-License-Identifier: Apache-2.0
"""Set Quattuor's W4A8 latencies beside those of each kind of peer: the record kernels_w4a8_ratios.

    python -m benchmarks.kernels.ratios

One row for each layer, token count and granularity, with and without the quantization of activations; contenders
without one (16-bit activations) count in both. A missing figure is None: the peer does not take the token count.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import record

__all__ = ["KINDS", "main", "ratios"]

#: Contenders by kind; the fastest of a kind stands for it.
KINDS = {
    "fp16": ("cublas_fp16",),
    "int8": ("cublas_int8", "cutlass_int8"),
    "fp8": ("cublas_fp8",),
    "w4a16": ("w4a16_humming", "w4a16_marlin", "w4a16_quattuor"),
    "humming": ("humming_w4a8",),
    "qqq": ("qqq_original",),
}
#: Kinds whose figures do not depend on the granularity of a 4-bit weight.
ALWAYS = ("fp16", "int8", "fp8", "w4a16")
SIXTEEN_BIT = (*KINDS["fp16"], *KINDS["w4a16"])

Row = dict[str, Any]


def ratios(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield a flat row for each of Quattuor's with integer group scales or none."""
    cases: dict[tuple[int, int, int], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["n"], row["k"], row["m"]), []).append(row)
    for (n, k, m), case in cases.items():
        for row in case:
            if row["contender"] == "quattuor" and not row["granularity"].endswith("_float"):
                yield {"n": n, "k": k, "m": m} | compare(row, case)


def compare(ours: Row, case: Sequence[Row]) -> Row:
    """Return Quattuor's latency, the best of each kind, and the ratios to them."""
    quantizes = ours["includes_activation_quantization"]
    peers = {kind: best(kind, ours["granularity"], quantizes, case) for kind in KINDS}
    known = {kind: us for kind, us in peers.items() if us is not None}
    fastest = min(known, key=lambda kind: known[kind])
    channel = next(
        row["latency_us"]
        for row in case
        if (row["contender"], row["granularity"]) == ("quattuor", "channel")
        and row["includes_activation_quantization"] == quantizes
    )
    latency = ours["latency_us"]
    return {
        "granularity": ours["granularity"],
        "with_quantization": quantizes,
        "implementation": ours["implementation"],
        "floor_us": ours["floor_us"],
        "quattuor_us": latency,
        **{f"{kind}_us": us for kind, us in peers.items()},
        **{f"over_{kind}": None if us is None else round(us / latency, 2) for kind, us in peers.items()},
        "of_channel_speed": round(channel / latency, 3),
        "fraction_of_floor": ours["fraction_of_floor"],
        "fastest_peer": fastest,
        "over_fastest_peer": round(known[fastest] / latency, 2),
        "is_ahead": latency < known[fastest],
    }


def best(kind: str, granularity: str, quantizes: bool, case: Sequence[Row]) -> float | None:
    """Return the lowest latency of a kind, or None where it has none."""
    found = [
        row["latency_us"]
        for row in case
        if row["contender"] in KINDS[kind]
        and (kind in ALWAYS or row["granularity"] == granularity)
        and (row["contender"] in SIXTEEN_BIT or row["includes_activation_quantization"] == quantizes)
    ]
    return min(found, default=None)


def main() -> None:
    """Write the record; it says where and when the latencies were measured, not where the ratios were formed."""
    source = record.read("kernels_w4a8")
    path = record.write("kernels_w4a8_ratios", list(ratios(source["rows"])))
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {key: source[key] for key in ("commit", "date", "hardware", "versions")}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.relative_to(record.ROOT))


if __name__ == "__main__":
    main()
