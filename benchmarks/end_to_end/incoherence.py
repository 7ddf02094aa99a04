# SPDX-License-Identifier: Apache-2.0
"""What a random basis, the range of levels and greedy passes do to single linears: the record `incoherence`.

    python -m benchmarks.end_to_end.incoherence MODEL [--data DIR] [--bits 2 3 4] [--blocks 1 8 15 22]

DIR holds `passages.txt`. Hessians are those of the original model. A row is one way to quantize, in the model's
own basis, with the inputs turned, or with inputs and outputs turned; `relative_error` is the geometric mean over
the linears of tr(D H D^T) / tr(W H W^T) with D = W - Q, and `worst_error` the largest. Runs on the CPU.
"""

import argparse
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from quattuor.calibration.data import calibration_batches
from quattuor.calibration.statistics import Hessian
from quattuor.checkpoints.source import ModelSource
from quattuor.granularity import PerChannel
from quattuor.solvers import GPTQ, CoordinateDescent, WeightQuantizer, WeightToQuantize, hessian_error
from quattuor.systems import gptq, quip, rtn

__all__ = ["Linear", "Way", "measure", "ways"]

NUM_PASSES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A weight and the Hessian of what it reads."""

    name: str
    weight: Tensor
    hessian: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to quantize a weight, and the words of its row."""

    basis: str
    levels: str
    rounding: str
    scale_of: str
    weights: WeightQuantizer


def ways(bits: int) -> list[Way]:
    """List uniform grids with and without column feedback, then QuIP with and without its basis."""
    greedy = {"num_passes": NUM_PASSES, "order": "activation"}
    listed = [_own("range", "nearest", "group of 64", rtn(bits, 64, symmetric=False).weights)]
    for size, scale_of in ((64, "group of 64"), (192, "group of 192"), (None, "row")):
        listed.append(_own("range", "feedback", scale_of, gptq(bits, size).weights))
        searched = gptq(bits, size, clip="weighted").weights
        listed.append(_own("searched", "feedback", scale_of, searched))
        assert searched is not None, "every system has weights"
        solver = CoordinateDescent(start=GPTQ(), num_passes=NUM_PASSES, refit=False)
        listed.append(_own("searched", "feedback, greedy", scale_of, replace(searched, solver=solver)))
    for levels, multiple in (("2.4 rms", 2.4), ("normal", None)):
        for rounding, options in (("feedback", {}), ("feedback, greedy", greedy)):
            weights = quip(bits, multiple=multiple, **options).weights  # type: ignore[arg-type]
            assert weights is not None, "every system has weights"
            plain = replace(weights, transform=None, granularity=PerChannel())
            listed.append(_own(levels, rounding, "row", plain))
            inputs = quip(bits, outputs=False, multiple=multiple, **options).weights  # type: ignore[arg-type]
            assert inputs is not None, "every system has weights"
            words = {"levels": levels, "rounding": rounding}
            listed.append(Way(basis="random inputs", scale_of="row", weights=inputs, **words))
            listed.append(Way(basis="random", scale_of="matrix", weights=weights, **words))
    return listed


def _own(levels: str, rounding: str, scale_of: str, weights: WeightQuantizer | None) -> Way:
    assert weights is not None, "every system has weights"
    return Way(basis="own", levels=levels, rounding=rounding, scale_of=scale_of, weights=weights)


def measure(way: Way, bits: int, linears: list[Linear]) -> dict[str, Any]:
    """Quantize the linears one by one and return the row of a way."""
    errors, stored, count = [], 0.0, 0
    for linear in linears:
        item = WeightToQuantize(name=linear.name, weight=linear.weight)
        tensor = way.weights.solve([item], {"hessian": linear.hessian})[0].tensor
        errors.append(hessian_error(linear.weight, tensor.decode(), linear.hessian))
        stored += tensor.bits_per_weight * linear.weight.numel()
        count += linear.weight.numel()
    return {
        "bits": bits,
        "basis": way.basis,
        "scale_of": way.scale_of,
        "levels": way.levels,
        "rounding": way.rounding,
        "bits_per_weight": stored / count,
        "relative_error": math.exp(sum(map(math.log, errors)) / len(errors)),
        "worst_error": max(errors),
        "linears": len(errors),
    }


@torch.no_grad()
def collect(model: Any, tokens: Tensor, blocks: list[int]) -> list[Linear]:
    """Return the linears of some blocks with the Hessians of their inputs."""
    prefixes = tuple(f"model.layers.{index}." for index in blocks)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefixes)
    }
    statistics = {name: Hessian() for name in found}

    def hook(name: str) -> Any:
        return lambda module, inputs: statistics[name].update(inputs[0].flatten(0, -2))

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in found.items()]
    for sequence in tokens:
        model.model(sequence[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [
        Linear(name=name, weight=module.weight.detach().float(), hessian=statistics[name].result())
        for name, module in found.items()
    ]


def main() -> None:
    """Measure, print a line per row, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=os.environ.get("QUATTUOR_DATA"))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 8, 15, 22])
    parser.add_argument("--samples", type=int, default=24)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name the data folder with --data or QUATTUOR_DATA")
    source = ModelSource(arguments.model)
    text = (Path(arguments.data) / "passages.txt").read_text()
    assert source.tokenizer is not None, "a model of a text has one"
    tokens = calibration_batches(source.tokenizer, text, arguments.samples, 512, seed=0)
    linears = collect(source.whole().float(), tokens, arguments.blocks)
    rows: list[dict[str, Any]] = []
    for bits in arguments.bits:
        for way in ways(bits):
            rows.append(measure(way, bits, linears))
            print(*rows[-1].values(), flush=True)
            record.write("incoherence", rows)


if __name__ == "__main__":
    main()
