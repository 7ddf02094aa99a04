# SPDX-License-Identifier: Apache-2.0
"""The diagonal of the empirical Fisher information: squared gradients of the loss, summed over sequences.

    F = sum_d g_d * g_d,   g_d = gradient of the mean next-token loss of sequence d

How much the loss of the whole model rises when one weight is moved, to second order around a minimum. It needs a
backward pass through the whole model, so it belongs to no block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from quattuor.errors import CalibrationError, UnsupportedError, compose

__all__ = ["collect_fisher"]


def collect_fisher(
    model: PreTrainedModel, names: Sequence[str], tokens: Int64[Tensor, "B T"]
) -> dict[str, Float[Tensor, "N K"]]:
    """Return the sum over sequences of the squared gradient of each named linear's weight.

    One backward pass per sequence where the model is, in its dtype. Each gradient is squared and added in float32
    as soon as it is complete, and then dropped: beside the model there is one float32 number per weight, and the
    gradient of one weight. The model's parameters, and what requires gradients, are as before afterwards.

    Args:
        model: In memory as a whole; its dropout is off during the passes.
        names: Full names of the linears.
        tokens: Sequences of at least two tokens, without padding.

    Raises:
        UnsupportedError: A weight is on the meta device, as in a model that is read block by block.
        CalibrationError: There is no token to predict, or a loss or a gradient is not finite.

    References:
        Kim et al., 2023, arXiv:2306.07629 (SqueezeLLM), section 4.1. The authors' code sums in bfloat16.
    """
    weights = {name: _weight(model, name) for name in names}
    if tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise _calibration_error(
            "tokens", tuple(tokens.shape), "hold no token to predict", "pass sequences of at least two tokens"
        )
    sums = {id(weight): torch.zeros_like(weight, dtype=torch.float32) for weight in weights.values()}
    with torch.enable_grad(), _only_these_require_gradients(model, list(weights.values()), sums):
        device = next(iter(weights.values())).device
        for index, sequence in enumerate(tokens):
            ids = sequence.to(device)
            logits = model(input_ids=ids[None, :], use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits.float(), ids[1:])
            if not bool(torch.isfinite(loss)):
                raise _calibration_error(
                    f"loss of sequence {index}", float(loss.detach()), "is not finite", "compute in float32"
                )
            loss.backward()
    for name, weight in weights.items():
        if not bool(torch.isfinite(sums[id(weight)]).all()):
            raise _calibration_error(
                f"gradient of {name}", "NaN or infinity", "is not finite", "compute in float32"
            )
    return {name: sums[id(weight)] for name, weight in weights.items()}


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    """Return the weight of a linear. Raises UnsupportedError when it is not in memory."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter), f"{name} is a linear"
    if not weight.is_meta:
        return weight
    raise UnsupportedError(
        compose(
            subject=f"{name}.weight",
            value="on the meta device",
            constraint="has no gradient: the model is read block by block",
            place="collect_fisher",
            remedy="load the whole model, as quantize_to_folder does, and pass it to quantize",
        )
    )


@contextmanager
def _only_these_require_gradients(
    model: nn.Module, weights: list[nn.Parameter], sums: dict[int, Tensor]
) -> Iterator[None]:
    """Add the square of each gradient to `sums` when it is complete, and restore the model afterwards."""

    def adder(total: Tensor) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None, "called when the gradient is there"
            total.add_(weight.grad.float().square_())
            weight.grad = None

        return add

    was_training = model.training
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _, _ in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    handles = []
    for weight in {id(weight): weight for weight in weights}.values():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(adder(sums[id(weight)])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        model.train(was_training)


def _calibration_error(subject: str, value: object, constraint: str, remedy: str) -> CalibrationError:
    return CalibrationError(
        compose(subject=subject, value=value, constraint=constraint, place="collect_fisher", remedy=remedy)
    )
