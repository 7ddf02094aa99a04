# SPDX-License-Identifier: Apache-2.0
"""What happens outside the blocks: both ends of the model, the first inputs, statistics of the whole model."""

import torch
from jaxtyping import Int64
from torch import Tensor

from quattuor.apply import choose, linear_names
from quattuor.calibration.blockwise import BlockRunner, Hidden, capture_inputs
from quattuor.calibration.fisher import collect_fisher
from quattuor.errors import CalibrationError, compose
from quattuor.folding import fold_final_norm_, rotate_ends_, untie_head_
from quattuor.models import DecoderDescription
from quattuor.pipeline.run import BlockStore, Run, choices_of, embedding_of
from quattuor.seeds import derive_seed
from quattuor.transforms import FoldNorms, RotateHeads, RotateResidual
from quattuor.transforms.base import SiteTransform

__all__ = ["collect_gradients", "embed", "emit_ends", "transform_ends_"]


def collect_gradients(run: Run, tokens: Int64[Tensor, "B T"] | None) -> None:
    """Collect the squared gradients of every linear that some part needs them for, before anything is changed."""
    names = list(linear_names(run.description, run.sites, run.report.blocks))
    choices = {name: choose(run.recipe, name) for name in names}
    needed = [name for name, choice in choices.items() if choice is not None and "fisher" in choice.weights.needs]
    if needed:
        with run.report.phase("gradients"):
            run.model_statistics["fisher"] = collect_fisher(run.model, needed, require_tokens(tokens))


def transform_ends_(run: Run, store: BlockStore) -> dict[str, Tensor]:
    """Load embeddings, final norm and head, rotate them, and return the rotations of the blocks."""
    model, description = run.model, run.description
    for path in _end_paths(description):
        store.load_(model.get_submodule(path), path)
    rotations: dict[str, Tensor] = {}
    for transform in run.recipe.transforms:
        seed = derive_seed(run.seed, type(transform).__name__)
        if isinstance(transform, FoldNorms):
            untie_head_(model)
            fold_final_norm_(model, description)
        elif isinstance(transform, RotateResidual):
            size = embedding_of(model).weight.shape[1]
            rotations["residual"] = transform.for_norm(description.norm).matrix(size, seed)
            rotate_ends_(model, description, rotations["residual"])
        elif isinstance(transform, RotateHeads):
            assert run.heads is not None, "legality was checked"
            rotations["heads"] = transform.matrix(run.heads.head_dim, seed)
    return rotations


def embed(
    run: Run, tokens: Int64[Tensor, "B T"] | None, batch_size: int, storage: torch.device
) -> tuple[Hidden, BlockRunner]:
    """Return what the first block receives; nothing when the recipe uses no data."""
    if not uses_data(run):
        return [], BlockRunner(run.description, [])
    tokens = require_tokens(tokens)
    device = embedding_of(run.model).weight.device
    return capture_inputs(
        run.model, run.description, tokens, batch_size=batch_size, device=device, storage=storage
    )


def emit_ends(run: Run, store: BlockStore) -> None:
    """Hand on what no block needs any more."""
    for path in _end_paths(run.description):
        store.emit(run.model.get_submodule(path), path)


def _end_paths(description: DecoderDescription) -> tuple[str, ...]:
    final = () if description.final_norm is None else (description.final_norm,)
    return (*description.embeddings, *final, description.head)


def uses_data(run: Run) -> bool:
    """Whether any part looks at activations; if not, no forward pass is run."""
    if any(isinstance(transform, SiteTransform) for transform in run.recipe.transforms):
        return True
    return any(choice.weights.needs.difference(run.model_statistics) for choice in choices_of(run))


def require_tokens(tokens: Int64[Tensor, "B T"] | None) -> Int64[Tensor, "B T"]:
    """Return the calibration sequences. Raises CalibrationError when there are none."""
    if tokens is not None and tokens.numel():
        return tokens
    raise CalibrationError(
        compose(
            subject="tokens",
            value=None if tokens is None else tuple(tokens.shape),
            constraint="hold no calibration sequence",
            place="quantize",
            remedy="pass at least one sequence of token ids",
        )
    )
