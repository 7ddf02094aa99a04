# SPDX-License-Identifier: Apache-2.0
"""A description found by looking at a model, for architectures nobody has described.

Only the linears of the decoder blocks are found; what ties them to norms and to each other stays unknown, so no
transform applies. Everything in a block that is not a linear stays in high precision; a block whose weights lie
mostly elsewhere is refused.
"""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quattuor.errors import UnsupportedError, compose
from quattuor.models.description import DecoderDescription
from quattuor.models.encoders import refuse_encoder

__all__ = ["discover"]


def discover(model: PreTrainedModel) -> DecoderDescription:
    """Describe an unknown decoder by its linears alone, each one an opaque site.

    The blocks are the members of the `nn.ModuleList` with the most parameters; of equals the outermost.

    Returns:
        A description without norms, attention and feed-forward, whose `linears` are those of every block.

    Raises:
        UnsupportedError: An encoder; no list of blocks, embeddings or head; blocks that differ from each other;
            or weights that plain linears do not hold, such as `Conv1D` or stacked experts.
    """
    refuse_encoder(model.config)
    blocks = _largest_list(model)
    members = list(model.get_submodule(blocks).children())
    linears = _linears(members[0], f"{blocks}.0")
    for index, member in enumerate(members[1:], start=1):
        _refuse_difference(linears, _linears(member, f"{blocks}.{index}"), f"{blocks}.{index}")
    return DecoderDescription(
        family=f"discovered {model.config.model_type}",
        model_types=(model.config.model_type,),
        blocks=blocks,
        embeddings=(_path(model, "get_input_embeddings"),),
        final_norm=None,
        head=_path(model, "get_output_embeddings"),
        linears=linears,
        block_returns_tuple=None,
    )


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _largest_list(model: PreTrainedModel) -> str:
    sizes: dict[str, int] = {
        name: _num_parameters(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    largest = max(sizes, key=sizes.__getitem__, default=None)
    if largest is None or sizes[largest] == 0:
        raise _refusal(
            subject="model_type",
            value=model.config.model_type,
            constraint="has no nn.ModuleList of blocks with parameters",
            place=type(model).__name__,
        )
    return largest


def _linears(block: nn.Module, place: str) -> tuple[str, ...]:
    """List the paths of the plain linears of a block; refuse weights that would be skipped."""
    linears: dict[str, int] = {}
    others: dict[str, int] = {}
    for path, module in block.named_modules():
        matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim >= 2]
        if type(module) is nn.Linear:
            linears[path] = module.weight.numel()
        elif matrices:
            _refuse_module(module, matrices, f"{place}.{path}" if path else place)
            others[path or type(block).__name__] = sum(parameter.numel() for parameter in matrices)
    held, skipped = sum(linears.values()), sum(others.values())
    if skipped >= held:
        raise _refusal(
            subject="block",
            value=type(block).__name__,
            constraint=(
                f"holds {held} weights in {len(linears)} nn.Linear and {skipped} elsewhere "
                f"({', '.join(others) or 'none'}), so most would stay in high precision"
            ),
            place=place,
        )
    return tuple(linears)


def _refuse_module(module: nn.Module, matrices: Sequence[nn.Parameter], place: str) -> None:
    """Refuse a module that multiplies by its weight as a linear does, but is none."""
    name = type(module).__name__
    if isinstance(module, Conv1D):
        constraint = "stores its weight transposed, [in, out], and is no nn.Linear"
        remedy = "replace it with an nn.Linear that holds weight.T"
    elif isinstance(module, nn.Linear):
        constraint = "is a subclass of nn.Linear, whose forward may differ"
        remedy = "replace it with nn.Linear, or describe the architecture in quattuor/models"
    elif any(matrix.ndim > 2 for matrix in matrices) and not isinstance(module, _ConvNd):
        constraint = "stacks several weights in one tensor, as mixtures of experts do, instead of using nn.Linear"
        remedy = "choose a dense model, or give every expert its own nn.Linear"
    else:
        return
    raise _refusal(subject="module", value=name, constraint=constraint, place=place, remedy=remedy)


def _refuse_difference(expected: tuple[str, ...], found: tuple[str, ...], place: str) -> None:
    difference = sorted(set(expected) ^ set(found))
    if difference:
        raise _refusal(
            subject="linears",
            value=", ".join(difference),
            constraint="are in this block or in the first one, but not in both; blocks must be alike",
            place=place,
        )


def _path(model: PreTrainedModel, getter: str) -> str:
    """Return the path of the module that a getter of the model returns."""
    module = getattr(model, getter)()
    for path, candidate in model.named_modules():
        if candidate is module and path:
            return str(path)
    raise _refusal(
        subject=f"{getter}()",
        value=module,
        constraint="is no module of the model",
        place=type(model).__name__,
        remedy="load it with AutoModelForCausalLM",
    )


def _refusal(
    *,
    subject: str,
    value: object,
    constraint: str,
    place: str,
    remedy: str = "describe the architecture in quattuor/models",
) -> UnsupportedError:
    return UnsupportedError(
        compose(subject=subject, value=value, constraint=constraint, place=place, remedy=remedy)
    )
