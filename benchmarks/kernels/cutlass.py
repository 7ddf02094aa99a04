# SPDX-License-Identifier: Apache-2.0
"""int8 products with scales per token and channel out of CUTLASS (cutlass_int8.cu), prepared for timing."""

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels.peers import Library, check_status, load_library, pointer, stream
from benchmarks.kernels.timing import Batch, Contender, floor_us, median_latencies, num_copies

__all__ = ["cutlass_int8", "load_cutlass"]

#: Configurations in cutlass_int8.cu: the token counts at which each is tried.
CONFIGS = {0: (1, 64), 1: (1, 64), 2: (17, 256), 3: (33, 512), 4: (65, None), 5: (65, 1024), 6: (129, None)}


def load_cutlass(include: str) -> dict[int, Library]:
    """Compile every configuration of cutlass_int8.cu; the headers are include/ of the repository of CUTLASS."""
    code = Path(__file__).with_name("cutlass_int8.cu").read_text()
    options = ["-gencode=arch=compute_90a,code=sm_90a", "-DNDEBUG"]

    def load(config: int) -> Library:
        library = load_library("cutlass", f"#define CONFIG {config}\n{code}", options, Path(include))
        library.workspace_bytes.restype = ctypes.c_longlong
        return library

    with ThreadPoolExecutor() as pool:
        return dict(zip(CONFIGS, pool.map(load, CONFIGS), strict=True))


def cutlass_int8(
    weight: Tensor, libraries: dict[int, Library], quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Iterator[Contender]:
    """CUTLASS with a scale per token and per channel; the fastest configuration at each token count."""
    out_features, in_features = weight.shape
    total = num_copies(weight.numel())
    weights = [torch.randint(-127, 128, weight.shape, dtype=torch.int8, device="cuda") for _ in range(total)]
    channel = torch.rand(out_features, device="cuda")
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    choices: dict[int, int] = {}

    def multiply(codes: Tensor, scale: Tensor, i: int, config: int) -> Tensor:
        library, sizes = libraries[config], (codes.shape[0], out_features, in_features, processors)
        out = torch.empty(codes.shape[0], out_features, dtype=torch.float16, device="cuda")
        workspace = torch.empty(max(16, library.workspace_bytes(*sizes)), dtype=torch.uint8, device="cuda")
        tensors = map(pointer, (codes, weights[i % total], out, scale, channel, workspace))
        check_status("cutlass_int8", library.run(*tensors, *sizes, stream()))
        return out

    def choose(batch: Batch) -> int:
        """Return the configuration with the least median latency; fixed at the first call for a token count."""
        num_tokens = batch.x.shape[0]
        if num_tokens not in choices:
            tried = [
                config
                for config, (first, last) in CONFIGS.items()
                if first <= num_tokens and (last is None or num_tokens <= last)
            ]
            candidates = [
                Contender(
                    name=str(config),
                    granularity="channel",
                    includes_activation_quantization=False,
                    copies=total,
                    run=lambda batch, i, config=config: multiply(batch.x_codes, batch.x_scale, i, config),
                )
                for config in tried
            ]
            latencies = median_latencies(candidates, batch, 2 * floor_us(num_tokens, out_features, in_features))
            choices[num_tokens] = tried[latencies.index(min(latencies))]
        return choices[num_tokens]

    def gate(batch: Batch) -> str | None:
        rows = torch.arange(0, batch.x.shape[0], max(1, batch.x.shape[0] // 8), device="cuda")
        sums = batch.x_codes[rows].double() @ weights[0].double().T
        expected = (sums * channel * batch.x_scale[rows, None]).half().double()
        found = multiply(batch.x_codes, batch.x_scale, 0, choose(batch))[rows]
        error = float((found.double() - expected).norm() / expected.norm())
        return None if error < 1e-3 else f"relative error {error:.4f}"

    for quantizes in (False, True):
        yield Contender(
            name="cutlass_int8",
            granularity="channel",
            includes_activation_quantization=quantizes,
            copies=total,
            gate=gate,
            describe=lambda num_tokens: f"configuration {choices[num_tokens]}",
            run=lambda batch, i, quantizes=quantizes: multiply(
                *(quantize(batch.x) if quantizes else (batch.x_codes, batch.x_scale)), i, choose(batch)
            ),
        )
