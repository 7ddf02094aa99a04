# SPDX-License-Identifier: Apache-2.0
"""Published kernels of others, prepared for timing: the package humming-kernels, the sources of QQQ and Marlin.

The CUDA sources are compiled here, without PyTorch's headers: their entry points take plain pointers. QQQ's and
Marlin's kernels are timed on random packed weights, since only their speed is asked for.
"""

import ctypes
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels.timing import Batch, Contender, num_copies
from quattuor.errors import InputError, compose

__all__ = [
    "Library",
    "check_status",
    "humming",
    "load_library",
    "load_marlin",
    "load_qqq",
    "marlin",
    "original_qqq",
    "pointer",
    "stream",
]

#: Parallel slabs of 64 tokens of the kernels of QQQ and Marlin; their locks and buffers are sized by it.
MAX_PARALLEL = 16
NVCC_OPTIONS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-shared", "-Xcompiler", "-fPIC")
HUMMING_CONFIGS = (
    ("humming_w4a8", "channel", {"dtype": "int4"}, {"dtype": "int8"}),
    ("humming_w4a8", "group128", {"dtype": "int4", "group_size": 128}, {"dtype": "int8"}),
    ("w4a16_humming", "group128", {"dtype": "int4", "group_size": 128}, None),
)

Library = ctypes.CDLL


def load_library(stem: str, code: str, options: Sequence[str], headers: Path | None = None) -> Library:
    """Compile a CUDA source unless it lies in the folder of temporary files, named by its content, and load it.

    Raises:
        InputError: The folder of headers lacks cutlass/cutlass.h.
        CalledProcessError: nvcc refused the source; its messages are on standard error.
    """
    folder = Path(tempfile.gettempdir()) / "quattuor_peers"
    library = folder / f"{stem}_{hashlib.sha256(code.encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        if headers is not None and not (headers / "cutlass" / "cutlass.h").is_file():
            raise InputError(
                compose(
                    subject="headers",
                    value=str(headers),
                    constraint="holds no cutlass/cutlass.h",
                    place="benchmarks.kernels.peers",
                    remedy="name the folder include/ of the repository of CUTLASS",
                )
            )
        folder.mkdir(exist_ok=True)
        file = library.with_suffix(".cu")
        file.write_text(code)
        included = [] if headers is None else [f"-I{headers}"]
        subprocess.run(["nvcc", *NVCC_OPTIONS, *options, *included, "-o", library, file], check=True)
    return ctypes.CDLL(str(library))


def kernel_source(source: Path, end_of_kernel: str) -> str:
    """Return the part of a CUDA source before a marker, without the includes of PyTorch.

    Raises:
        InputError: The file does not exist or does not contain the marker.
    """
    text = source.read_text() if source.is_file() else ""
    if end_of_kernel not in text:
        raise InputError(
            compose(
                subject="source",
                value=str(source),
                constraint=f"holds no kernel up to {end_of_kernel!r}",
                place="benchmarks.kernels.peers",
                remedy="name the folder with the published CUDA sources",
            )
        )
    kept = [line for line in text[: text.index(end_of_kernel)].splitlines() if "#include <torch" not in line]
    kept = [line for line in kept if "#include <ATen" not in line]
    return "#include <cassert>\n" + "\n".join(kept) + "\n"


def load_qqq(folder: str) -> Library:
    """Compile the kernel published with QQQ (csrc/ of its repository)."""
    wrapper = """extern "C" int run(const void* A, const void* B, void* C, void* D, const void* s1, const void* s2,
        const void* s3, int m, int n, int k, void* locks, int group_size, void* stream) {
        return qqq_cuda(A, B, C, D, s1, s2, s3, m, n, k, locks, group_size, 0, (cudaStream_t)stream); }"""
    code = kernel_source(Path(folder) / "qqq_gemm.cu", "void qqq_gemm(") + wrapper
    return load_library("qqq_gemm", code, ["-gencode=arch=compute_90,code=sm_90"])


def load_marlin(folder: str) -> Library:
    """Compile the W4A16 kernel published as Marlin (marlin/ of its repository), without its cache hints.

    ptxas 13 drops the instruction that makes the hint's operand (issue 44 of the repository), and the copies that
    read it trap as illegal instructions; without hints the copies are those of the kernel of QQQ.
    """
    wrapper = """extern "C" int run(const void* A, const void* B, void* C, void* s, int m, int n, int k,
        void* locks, int group_size, void* stream) {
        return marlin_cuda(A, B, C, s, m, n, k, locks, group_size, 0, (cudaStream_t)stream); }
        #endif"""
    code = kernel_source(Path(folder) / "marlin_cuda_kernel.cu", "\n#endif")
    lines = [line for line in code.splitlines() if ".reg .b64 p;" not in line and "createpolicy" not in line]
    code = "\n".join(lines).replace(".L2::cache_hint [%0], [%1], %2, p;", " [%0], [%1], %2;")
    return load_library("marlin", code + "\n" + wrapper, ["-gencode=arch=compute_90,code=sm_90"])


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return the address of a tensor, or the null pointer."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def stream() -> ctypes.c_void_p:
    """Return the current CUDA stream."""
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def check_status(name: str, status: int) -> None:
    """Raise RuntimeError when a peer's entry point reports failure."""
    if status:
        raise RuntimeError(f"{name} returned status {status}")


def original_qqq(weight: Tensor, library: Library, quantize: object) -> Iterator[Contender]:
    """The kernel published with QQQ; `quantize` is the token quantization to count."""
    out_features, in_features = weight.shape
    total = num_copies(weight.numel() // 2)
    shape = (in_features // 16, out_features * 2)
    packed = [torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda") for _ in range(total)]
    sums = torch.zeros(MAX_PARALLEL * 64, out_features, dtype=torch.int32, device="cuda")
    channel = torch.rand(1, out_features, device="cuda")
    group = torch.rand(in_features // 128, out_features, device="cuda").half()
    locks = torch.zeros(out_features // 128 * MAX_PARALLEL, dtype=torch.int32, device="cuda")

    def multiply(codes: Tensor, scale: Tensor, i: int, group_scale: Tensor | None) -> Tensor:
        out = torch.empty(codes.shape[0], out_features, dtype=torch.float16, device="cuda")
        tensors = (codes, packed[i % total], sums, out, scale, channel, group_scale)
        sizes = (codes.shape[0], out_features, in_features)
        group_size = -1 if group_scale is None else 128
        status = library.run(*map(pointer, tensors), *sizes, pointer(locks), group_size, stream())
        check_status("qqq_original", status)
        return out

    for granularity, scales in (("channel", None), ("group128", group)):
        for quantizes in (False, True):
            yield Contender(
                name="qqq_original",
                granularity=granularity,
                includes_activation_quantization=quantizes,
                copies=total,
                run=lambda batch, i, scales=scales, quantizes=quantizes: multiply(
                    *(quantize(batch.x) if quantizes else (batch.x_codes, batch.x_scale)), i, scales
                ),
            )


def marlin(weight: Tensor, library: Library) -> Iterator[Contender]:
    """The W4A16 kernel published as Marlin, groups of 128."""
    out_features, in_features = weight.shape
    total = num_copies(weight.numel() // 2)
    shape = (in_features // 16, out_features * 2)
    packed = [torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda") for _ in range(total)]
    group = torch.full((in_features // 128, out_features), 1 / 64, dtype=torch.float16, device="cuda")
    locks = torch.zeros(out_features // 128 * MAX_PARALLEL, dtype=torch.int32, device="cuda")

    def multiply(batch: Batch, codes: Tensor) -> Tensor:
        num_tokens = batch.x.shape[0]
        out = torch.empty(num_tokens, out_features, dtype=torch.float16, device="cuda")
        tensors = map(pointer, (batch.x, codes, out, group))
        status = library.run(*tensors, num_tokens, out_features, in_features, pointer(locks), 128, stream())
        check_status("w4a16_marlin", status)
        return out

    def gate(batch: Batch) -> str | None:
        found = multiply(batch, torch.full_like(packed[0], 0xBBBBBBBB - 2**32))  # every weight is 11 - 8
        expected = (batch.x.float().sum(dim=1, keepdim=True) * 3 / 64).expand_as(found)
        error = float((found.float() - expected).norm() / expected.norm())
        return None if error < 2e-3 else f"relative error {error:.4f}"

    yield Contender(
        name="w4a16_marlin",
        granularity="group128",
        includes_activation_quantization=False,
        copies=total,
        gate=gate,
        run=lambda batch, i: multiply(batch, packed[i % total]),
        # a slab of 64 tokens starts where the one before ended, so that a last slab must be whole
        takes=lambda num_tokens: num_tokens <= 64 or num_tokens % 64 == 0,
    )


def humming_layers(weight: Tensor, total: int, weight_config: dict, input_config: dict | None) -> list[object]:
    """Return layers of the package with one weight each, the first with the given one."""
    from humming.layer import HummingLayer

    layers = []
    for i in range(total):
        layer = HummingLayer(
            shape_n=weight.shape[0],
            shape_k=weight.shape[1],
            weight_config=dict(weight_config),
            input_config=dict(input_config) if input_config else None,
            torch_dtype=torch.float16,
        ).cuda()
        layer.load_from_unquantized(weight if i == 0 else torch.randn_like(weight))
        layer.transform()
        layers.append(layer)
    return layers


def humming_choice(layer: object, token_counts: tuple[int, ...]) -> str:
    """Return the package's own choice of kernel for these token counts, so that it compiles no others."""
    from humming.tune import get_heuristics_config

    ranges = get_heuristics_config(layer.humming_config, device=0)
    chosen = [item for item in ranges if any(item[0] < count <= item[1] for count in token_counts)]
    return json.dumps(chosen)


def humming(
    weight: Tensor, token_counts: tuple[int, ...], configs: Sequence[tuple] = HUMMING_CONFIGS
) -> Iterator[Contender]:
    """The package humming-kernels, with int8 and with 16-bit activations."""
    total = num_copies(weight.numel() // 2)
    for name, granularity, weight_config, input_config in configs:
        layers = humming_layers(weight, total, weight_config, input_config)
        choice = humming_choice(layers[0], token_counts)

        def gate(batch: Batch, layer: object = layers[0], choice: str = choice) -> str | None:
            expected = batch.x[:4].float() @ weight.float().T
            found = layer(batch.x, tuning_config=choice)[:4].float()
            error = float((found - expected).norm() / expected.norm())
            return None if error < 0.3 else f"relative error {error:.3f}"

        shared = {"name": name, "granularity": granularity, "copies": total}
        yield Contender(
            **shared,
            includes_activation_quantization=input_config is not None,
            gate=gate,
            run=lambda batch, i, layers=layers, choice=choice: layers[i % total](batch.x, tuning_config=choice),
        )
        if input_config is not None:
            yield Contender(
                **shared,
                includes_activation_quantization=False,
                run=lambda batch, i, layers=layers, choice=choice: layers[i % total](
                    batch.x_codes, input_scale=batch.x_scale[:, None], tuning_config=choice
                ),
            )
