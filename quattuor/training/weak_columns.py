# SPDX-License-Identifier: Apache-2.0
"""Weak-column tuning: train the float16 columns of a packed model while every code stays as it is.

With z the input of a weight whose codes decode to D, and V the columns that are added at places c,

    y = z @ D.T + z[:, c] @ V.T,   dV = dy.T @ z[:, c],   dz = dy @ (D + V at c)

Only z[:, c] is kept for the backward pass, and D is decoded again in it: no dense weight is stored.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from quattuor.deltas import ColumnDelta
from quattuor.errors import InputError, compose
from quattuor.nn.linear import QuantizedLinear

__all__ = ["TunableColumns", "keep_columns_", "make_tunable_", "tune_weak_columns"]


class TunableColumns(nn.Module):
    """A packed linear whose weak columns are parameters.

    The parameter is a float32 master of the stored columns, since float16 would lose small updates. The product
    uses its float16 rounding, so that what is trained is what will be stored.

    Args:
        linear: A packed linear with whole columns beside its codes.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        """Take the columns out of the product with the codes."""
        super().__init__()
        tensor = linear.tensor_on(linear.device)
        delta = tensor.delta
        assert isinstance(delta, ColumnDelta), "only these are replaced"
        self.linear = linear
        self.input_map, self.output_map = tensor.input_map, tensor.output_map
        codes = replace(tensor, delta=None, input_map=None, output_map=None)
        self.codes = QuantizedLinear.from_tensor(
            codes, None, linear.layout.activations, dtype=torch.float32, name=linear.name
        )
        self.codes.force = linear.force
        self.codes.keeps_stored = True  # the backward pass decodes them
        self.register_buffer("indices", delta.indices.long())
        self.values = nn.Parameter(delta.values.float())

    def forward(self, x: Tensor) -> Tensor:
        """Return y in the dtype of x; any number of leading dimensions."""
        rows = x.reshape(-1, x.shape[-1])
        inputs = rows if self.input_map is None else self.input_map.apply(rows)
        y: Tensor = _ColumnProduct.apply(inputs, self.values, self.codes, self.get_buffer("indices"))  # type: ignore[no-untyped-call]
        if self.output_map is not None:
            y = self.output_map.apply(y)
        if self.bias is not None:
            y = y + self.bias.float()
        result: Tensor = y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])
        return result

    @property
    def bias(self) -> Tensor | None:
        """The bias of the packed linear."""
        return cast(Tensor | None, self.linear.bias)

    def stored_values(self) -> Float[Tensor, "N k"]:
        """Return the columns as they are stored. Raises InputError when one is beyond float16."""
        values = self.values.detach().to(torch.float16)
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                compose(
                    subject="tuned column",
                    value=float(self.values.detach().abs().max()),
                    constraint="is not finite, or beyond the range of float16",
                    place=self.linear.name,
                    remedy="use a smaller learning rate",
                )
            )
        return values


class _ColumnProduct(torch.autograd.Function):
    """The product of the module's docstring, in float32."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor, codes: QuantizedLinear, indices: Tensor) -> Tensor:
        """Return y; keep only the inputs of the columns."""
        picked = z[:, indices].float()
        rounded = values.to(torch.float16).float()
        ctx.codes, ctx.dtype = codes, z.dtype
        ctx.save_for_backward(picked, rounded, indices)
        y: Tensor = codes(z.float()) + picked @ rounded.T
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of z and of the columns."""
        (gradient,) = gradients
        picked, rounded, indices = ctx.saved_tensors
        of_inputs = None
        if ctx.needs_input_grad[0]:
            of_inputs = gradient @ ctx.codes.tensor.decode_codes()
            of_inputs = of_inputs.index_add_(1, indices, gradient @ rounded).to(ctx.dtype)
        return of_inputs, gradient.T @ picked, None, None


def make_tunable_(model: nn.Module) -> dict[str, nn.Parameter]:
    """Make the weak columns of a packed model parameters, and freeze everything else.

    Args:
        model: A model with packed linears, some of them with whole columns beside their codes (`owq`).

    Returns:
        The columns of each linear, by its name.

    Raises:
        InputError: No linear has such columns.
    """
    model.requires_grad_(False)
    linears = {name: item for name, item in model.named_modules() if isinstance(item, QuantizedLinear)}
    found = {name: item for name, item in linears.items() if isinstance(item.tensor.delta, ColumnDelta)}
    if not found:
        raise InputError(
            compose(
                subject="model",
                value=f"{len(linears)} packed linears",
                constraint="have no whole columns in float16",
                place="make_tunable_",
                remedy="quantize it with owq, whose target_bits exceed its bits",
            )
        )
    parameters: dict[str, nn.Parameter] = {}
    for name, linear in found.items():
        tunable = TunableColumns(linear)
        model.set_submodule(name, tunable)
        parameters[name] = tunable.values
    return parameters


def keep_columns_(model: nn.Module) -> None:
    """Put the columns back into the packed linears, in float16, and undo `make_tunable_`.

    Raises:
        InputError: A column left the range of float16; the model stays tunable.
    """
    tunable = {name: item for name, item in model.named_modules() if isinstance(item, TunableColumns)}
    stored = {name: item.stored_values() for name, item in tunable.items()}
    for name, item in tunable.items():
        tensor = item.linear.tensor_on(item.linear.device)
        delta = ColumnDelta(indices=item.get_buffer("indices").to(torch.int32), values=stored[name])
        bias = item.bias
        linear = QuantizedLinear.from_tensor(
            replace(tensor, delta=delta),
            bias,
            item.linear.layout.activations,
            dtype=torch.float32 if bias is None else bias.dtype,
            name=item.linear.name,
        )
        linear.force = item.linear.force
        model.set_submodule(name, linear)


def tune_weak_columns(
    model: PreTrainedModel,
    tokens: Int64[Tensor, "B T"],
    *,
    steps: int = 100,
    learning_rate: float = 1e-5,
    batch_size: int = 4,
    seed: int = 0,
) -> list[float]:
    """Train the weak columns of a packed model on the loss of next tokens, in place.

    Args:
        model: A model that `owq` quantized; codes, scales and zero points stay bit for bit.
        tokens: Sequences to train on.
        steps: Steps of Adam.
        learning_rate: Of every step.
        batch_size: Sequences per step, drawn with replacement.
        seed: Of the draw.

    Returns:
        The loss before each step.

    Raises:
        InputError: The model has no weak columns, a count is not positive, or the training diverged.

    References:
        Lee et al., 2023, arXiv:2306.02272 (OWQ), section 3.3.
    """
    if min(steps, batch_size, len(tokens)) < 1 or not 0 < learning_rate < float("inf"):
        raise InputError(
            compose(
                subject="steps, batch_size, sequences, learning_rate",
                value=(steps, batch_size, len(tokens), learning_rate),
                constraint="are not all positive",
                place="tune_weak_columns",
                remedy="use positive counts, and a learning rate such as 1e-5",
            )
        )
    parameters = make_tunable_(model)
    optimizer = torch.optim.Adam(parameters.values(), lr=learning_rate)
    generator, losses = torch.Generator().manual_seed(seed), []
    device = next(iter(parameters.values())).device
    for _ in range(steps):
        rows = torch.randint(len(tokens), (batch_size,), generator=generator)
        batch = tokens[rows].to(device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    keep_columns_(model)
    return losses
