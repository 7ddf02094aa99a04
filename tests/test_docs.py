# SPDX-License-Identifier: Apache-2.0
"""What the documentation says is true of the code: names, links, tables, commands and listings.

Parts of pages between `<!-- generated: NAME -->` and `<!-- /generated -->` are made from the code.
`python tests/test_docs.py` writes them again after a change of the code.
"""

import contextlib
import importlib
import inspect
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from test_import_rows import EXCEPTIONS, ROWS
from tiny_models import tiny_model, tiny_tokenizer

from quattuor.checkpoints import CHECKPOINTS
from quattuor.cli import app
from quattuor.cli_arguments import build_recipe, describe_parameters
from quattuor.errors import InputError
from quattuor.granularity import PerGroup
from quattuor.models import DESCRIPTIONS
from quattuor.recipe import Recipe
from quattuor.systems import SYSTEMS
from quattuor.transforms.smoothing import smoothing_scale

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "quattuor").rglob("README.md"))
    if page.is_file()
)
GENERATED = re.compile(
    r"^<!-- generated: (?P<name>[^\n]*?) -->\n(?P<body>.*?)^<!-- /generated -->$", re.MULTILINE | re.DOTALL
)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def systems() -> str:
    """Return every system with the first line of its docstring."""
    rows = [
        [f"[`{name}`](docs/systems/{name}.md)", (inspect.getdoc(system) or "").partition("\n")[0]]
        for name, system in SYSTEMS.items()
    ]
    return table(["system", "what it does"], rows)


def options(name: str) -> str:
    """Return every option of a system with its type, default and meaning."""
    documented = inspect.getdoc(SYSTEMS[name]) or ""
    rows = []
    for option, facts in describe_parameters(SYSTEMS[name]).items():
        meaning = re.search(rf"^    {option}: (.*?)(?=^    \S|^\S|\Z)", documented, re.MULTILINE | re.DOTALL)
        assert meaning is not None, f"{name}: {option} is not documented"
        rows.append([f"`{option}`", facts["type"], f"`{facts['default']}`", " ".join(meaning[1].split())])
    return table(["option", "type", "default", "meaning"], rows)


def import_rows() -> str:
    """Return the import table."""
    rows = [
        [str(number), ", ".join(f"`{name}`" for name in sorted(names))] for number, names in enumerate(ROWS, 1)
    ]
    return table(["row", "modules"], rows)


def import_exceptions() -> str:
    """Return the imports that do not point downwards."""
    rows = [[f"`{part}`", f"`{imported}`", reason] for (part, imported), reason in EXCEPTIONS.items()]
    return table(["module", "imports", "because"], rows)


GENERATORS: dict[str, Callable[..., str]] = {
    "systems": systems,
    "options": options,
    "import rows": import_rows,
    "import exceptions": import_exceptions,
}


def fill(text: str) -> str:
    """Return a page with its generated parts made again."""

    def replacement(match: re.Match[str]) -> str:
        kind, _, argument = match["name"].partition("=")
        made = GENERATORS[kind](*([argument] if argument else []))
        return f"<!-- generated: {match['name']} -->\n{made}<!-- /generated -->"

    return GENERATED.sub(replacement, text)


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def without_listings(text: str) -> str:
    """Return a page without fenced and indented listings."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<=\n\n)(?: {4}.*\n+)+", "", text)


def listings(page: Path, language: str) -> list[str]:
    """Return the fenced listings of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@every_page
def test_generated_parts_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- generated:") == len(GENERATED.findall(text)), "a part is not closed"
    assert fill(text) == text, "run python tests/test_docs.py"


def test_generated_parts_are_where_they_belong() -> None:
    found = {
        (page.relative_to(ROOT).as_posix(), match["name"])
        for page in PAGES
        for match in GENERATED.finditer(page.read_text(encoding="utf-8"))
    }
    assert found == {
        ("README.md", "systems"),
        ("docs/architecture.md", "import rows"),
        ("docs/architecture.md", "import exceptions"),
        *((f"docs/systems/{name}.md", f"options={name}") for name in SYSTEMS),
    }


@every_page
def test_links_resolve(page: Path) -> None:
    text = without_listings(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target}"


@every_page
def test_named_files_exist(page: Path) -> None:
    """A path in backticks is a file of the repository, unless it holds a placeholder such as <name>."""
    text = without_listings(page.read_text(encoding="utf-8"))
    for path in re.findall(r"`((?:quattuor|tests|docs|benchmarks|examples)/[\w./-]*)`", text):
        if path != "benchmarks/results/qqq_accuracy.json":  # measured, not written
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def named_objects() -> list[tuple[str, str]]:
    """Return file and name of everything in the equation tables."""
    found = []
    for page in sorted((ROOT / "docs" / "systems").glob("*.md")):
        for line in page.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
            files = [match[1] for cell in cells if (match := re.fullmatch(r"`(quattuor/[\w/]+\.py)`", cell))]
            for file in files:
                names = re.findall(r"`([A-Za-z_][\w.]*)`", cells[cells.index(f"`{file}`") + 1])
                assert names, f"{page.name}: {line}"
                found += [(file, name) for name in names]
    return found


@pytest.mark.parametrize(("file", "name"), named_objects())
def test_equation_tables_name_what_exists(file: str, name: str) -> None:
    value: Any = importlib.import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    for part in name.split("."):
        value = getattr(value, part)
    assert inspect.getsourcefile(inspect.unwrap(value.fget if isinstance(value, property) else value)) == str(
        ROOT / file
    ), "it is defined elsewhere"


def test_equation_table_of_qqq_is_complete() -> None:
    named = {name for _, name in named_objects()}
    assert len(named_objects()) >= 15
    assert {"AdaptiveSmoothing.find", "GPTQ.solve", "TwoLevelInteger.level8", "RotateResidual"} <= named


def test_every_module_has_a_place_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = {part.stem for part in (ROOT / "quattuor").iterdir() if part.is_dir() or part.suffix == ".py"}
    for part in parts - {"__init__", "__pycache__", "py"}:
        assert f"`{part}" in text or f"/{part}" in text or f"{part}.py" in text, part


def test_existing_modules_of_the_import_table() -> None:
    """Rows may name folders that are still to come; the page says which."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    planned = set(
        re.findall(r"`(\w+)`", re.search(r"^Not there yet: (.*?)\n\n", text, re.MULTILINE | re.DOTALL)[1])
    )
    existing = {part.stem for part in (ROOT / "quattuor").iterdir()}
    assert {name for names in ROWS for name in names} - existing == planned


def test_readme_fits_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_readme_names_every_architecture() -> None:
    text = re.sub(r"[ -]", "", (ROOT / "README.md").read_text(encoding="utf-8").lower())
    for description in DESCRIPTIONS.values():
        assert re.match(r"[a-z]+", description.family)[0] in text, description.family


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))],
    ids=lambda page: page.name,
)
def test_commands_are_accepted(page: Path) -> None:
    """Every command line in a listing is parsed by the program; systems and settings must exist."""
    group: Any = typer.main.get_command(app)
    for line in re.findall(r"^ {4}(quattuor [a-z].*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        _, name, *arguments = shlex.split(line, comments=True)
        assert name in group.commands, line
        context = group.commands[name].make_context(name, arguments)
        if context.params.get("system"):
            build_recipe(context.params["system"], context.params["settings"] or [], None)


def test_python_of_the_readme_runs(tmp_path: Path) -> None:
    folder = tmp_path / "path" / "to" / "model"
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    quantize, load = listings(ROOT / "README.md", "python")
    with inside(tmp_path):
        exec(quantize, {})
        names: dict[str, Any] = {}
        exec(load, names)
    assert type(names["model"].model.layers[0].mlp.up_proj).__name__ == "QuantizedLinear"


def test_system_of_the_contributing_guide_is_one() -> None:
    [listing] = listings(ROOT / "CONTRIBUTING.md", "python")
    names: dict[str, Any] = {"__name__": "listing"}
    exec(listing, names)
    [system] = [value for value in names.values() if getattr(value, "__module__", None) == "listing"]
    recipe = system()
    assert isinstance(recipe, Recipe)
    assert recipe.systems == (system.__name__,)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert len(listing.splitlines()) <= 100


def test_quotations_of_the_conventions() -> None:
    text = (ROOT / "docs" / "conventions.md").read_text(encoding="utf-8")
    with pytest.raises(InputError) as caught:
        PerGroup(96).num_groups(4096)
    assert f"    {caught.value}\n" in text, "the error message is another one by now"
    assert inspect.getsource(inspect.unwrap(smoothing_scale)).splitlines()[:2] == [
        line.removeprefix("    ")
        for line in re.findall(r"^ {4}def smoothing_scale.*\n.*$", text, re.MULTILINE)[0].splitlines()
    ]


def test_pages_of_systems_and_formats() -> None:
    for name in SYSTEMS:
        assert (ROOT / "docs" / "systems" / f"{name}.md").is_file(), "write a page for a new system"
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert all(f"`{method}`" in text for method in CHECKPOINTS)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if fill(text) != text:
            page.write_text(fill(text), encoding="utf-8")
            print(page.relative_to(ROOT), "written")
