# SPDX-License-Identifier: Apache-2.0
"""What is prepared without a GPU: sources of peers, cases of the checkers and of first calls."""

import re
from pathlib import Path

import pytest

from benchmarks.kernels import cutlass, first_call, peers, sanitize
from benchmarks.shapes import TOKEN_COUNTS
from quattuor.errors import InputError
from quattuor.kernels.lut_linear.op import IMPLEMENTATIONS as LUT
from quattuor.kernels.w4a8_linear.op import IMPLEMENTATIONS as W4A8
from quattuor.kernels.w4a16_linear.op import IMPLEMENTATIONS as W4A16

MARLIN = """#include <cuda_fp16.h>
#include <torch/all.h>
asm volatile(
    "{\\n"
    "   .reg .b64 p;\\n"
    "   createpolicy.fractional.L2::evict_first.b64 p, 1.0;"
    "   cp.async.cg.shared.global.L2::cache_hint [%0], [%1], %2, p;\\n"
    "}\\n" :: "r"(smem), "l"(glob_ptr), "n"(BYTES)
);
#endif
pybind
"""


def test_marlin_loses_its_cache_hints_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "marlin_cuda_kernel.cu").write_text(MARLIN)
    given = {}
    monkeypatch.setattr(peers, "load_library", lambda stem, code, options: given.update(code=code))
    peers.load_marlin(str(tmp_path))
    assert not re.search(r"createpolicy|cache_hint|\.b64|torch/|pybind", given["code"])
    assert "cp.async.cg.shared.global [%0], [%1], %2;" in given["code"]
    assert given["code"].count("(") == given["code"].count(")")
    assert given["code"].rstrip().endswith("#endif")


def test_a_source_without_the_kernel_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no kernel up to"):
        peers.load_qqq(str(tmp_path))


def test_headers_are_needed_until_a_library_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(InputError, match=r"holds no cutlass/cutlass\.h"):
        cutlass.load_cutlass(str(tmp_path))


def test_every_configuration_of_the_source_is_tried_at_some_token_count():
    source = Path(cutlass.__file__).with_name("cutlass_int8.cu").read_text()
    assert {int(number) for number in re.findall(r"CONFIG == (\d+)", source)} == set(cutlass.CONFIGS)
    for first, last in cutlass.CONFIGS.values():
        assert any(first <= count and (last is None or count <= last) for count in TOKEN_COUNTS)
    for count in (*TOKEN_COUNTS, 3, 100_000):
        assert any(first <= count and (last is None or count <= last) for first, last in cutlass.CONFIGS.values())


def test_every_gpu_implementation_is_checked_and_its_first_call_timed():
    for name, implementations in (("w4a8", W4A8), ("w4a16", W4A16), ("lut", LUT)):
        for item in implementations:
            if item.name in ("triton", "gluon"):
                assert any(case.startswith(f"{name}_{item.name}") for case in sanitize.CASES)
                assert any(case.startswith(f"{name}_{item.name}") for case in first_call.CASES)


def test_the_summary_of_a_checker_is_read():
    errors = "========= Invalid __global__ write\n========= ERROR SUMMARY: 3 errors\n"
    assert sanitize.summary(errors) == 3
    assert sanitize.summary("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)") == 0
    assert sanitize.summary("========= Error: Target application terminated\n") is None
