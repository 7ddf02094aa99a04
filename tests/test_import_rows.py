# SPDX-License-Identifier: Apache-2.0
"""The import order of docs/architecture.md: a module imports from lower rows or from its own folder."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import quattuor

PACKAGE = Path(quattuor.__file__).parent

ROWS: list[set[str]] = [
    {"errors", "progress", "granularity", "seeds"},
    {"formats", "kernels", "models", "online_maps"},
    {"deltas"},
    {"quantized_tensor"},
    {"transforms", "scales", "outliers", "activations", "calibration"},
    {"solvers", "kv_cache", "nn", "rules"},
    {"recipe", "folding", "quantization_report"},
    {"apply", "site_search", "training", "checkpoints"},
    {"pipeline", "systems"},
    {"quantize"},
    {"serving", "evaluation", "reports"},
    {"cli", "cli_arguments", "cli_bench", "cli_export", "cli_progress", "cli_runs", "cli_serve", "demo"},
]
ROW_OF = {name: number for number, names in enumerate(ROWS, start=1) for name in names}

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("granularity", "errors"): "every module reports its own errors; errors imports nothing",
    ("transforms", "activations"): "a site is searched under the activation quantizer that it will meet",
    ("transforms", "scales"): "a site is searched under an imitation of the weight grid",
    ("outliers", "scales"): "a rule scores entries by what the weight grid does to them",
    ("rules", "solvers"): "a rule holds a WeightQuantizer",
    ("reports", "evaluation"): "a stored result holds the measurements of an evaluation",
    ("reports", "__init__"): "the version is stated once, in the public index",
    ("cli", "cli_arguments"): "the command line is one concept in several files",
    ("cli", "cli_bench"): "the command line is one concept in several files",
    ("cli", "cli_export"): "the command line is one concept in several files",
    ("cli", "cli_serve"): "the command line is one concept in several files",
    ("cli", "cli_progress"): "the command line is one concept in several files",
    ("cli", "cli_runs"): "the command line is one concept in several files",
    ("cli", "demo"): "the demo is a command",
    ("demo", "cli_runs"): "the demo runs what the commands run",
}
"""Imports that do not point downwards, each with its reason; everything else is an error."""

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    """Return the folder or top-level module that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and part of every import of this package, wherever it stands in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "quattuor" else [module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            names = [str(item.value) for item in node.args if isinstance(item, ast.Constant)]
        else:
            continue
        for name in names:
            if name == "quattuor" or name.startswith("quattuor."):
                yield node.lineno, name.split(".")[1] if "." in name else "__init__"


def violation(part: str, imported: str) -> str | None:
    """Say what is wrong with an import, or nothing."""
    if imported == part or (part, imported) in EXCEPTIONS:
        return None
    if imported not in ROW_OF:
        return f"imports quattuor.{imported}, which has no row"
    if ROW_OF[imported] >= ROW_OF[part]:
        return f"row {ROW_OF[part]} imports quattuor.{imported} of row {ROW_OF[imported]}"
    return None


def test_every_module_has_a_row() -> None:
    assert {part_of(file) for file in FILES} - {"__init__"} <= set(ROW_OF)
    assert len(FILES) > 30


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file: Path) -> None:
    part = part_of(file)
    if part == "__init__":  # the public index imports whatever it shows
        return
    found = [
        f"{file.relative_to(PACKAGE)}:{line} {problem}"
        for line, imported in imports(ast.parse(file.read_text()), file)
        if (problem := violation(part, imported))
    ]
    assert not found, "\n".join(found)


def test_no_import_hides_behind_type_checking() -> None:
    for file in FILES:
        assert "TYPE_CHECKING" not in file.read_text(), file


def test_exceptions_are_needed() -> None:
    used = {
        (part_of(file), imported)
        for file in FILES
        if part_of(file) != "__init__"
        for _, imported in imports(ast.parse(file.read_text()), file)
    }
    assert set(EXCEPTIONS) <= used, f"delete {sorted(set(EXCEPTIONS) - used)}"


def test_the_check_finds_what_it_should() -> None:
    source = (
        "import quattuor.quantize\nfrom quattuor import cli\ndef f():\n    from quattuor.recipe import Recipe\n"
    )
    found = list(imports(ast.parse(source), Path("x.py")))
    assert found == [(1, "quantize"), (2, "cli"), (4, "recipe")]
    hidden = 'import importlib\nimportlib.import_module("quattuor.apply")\nimport_module(name)\nimport quattuor\n'
    assert sorted(imports(ast.parse(hidden), Path("x.py"))) == [(2, "apply"), (4, "__init__")]
    assert violation("formats", "recipe") == f"row 2 imports quattuor.recipe of row {ROW_OF['recipe']}"
    assert violation("formats", "models") == "row 2 imports quattuor.models of row 2"
    assert violation("recipe", "formats") is None
    assert violation("recipe", "utils") == "imports quattuor.utils, which has no row"
