# SPDX-License-Identifier: Apache-2.0
"""Improve given codes by coordinate descent on the output error, one column at a time.

With D = W - Q and G = D H, the best value of column k while all others stay is q_k + G[:, k] / H_kk. Encoding it
and updating G keeps the error tr(D H D^T) from ever rising. Between passes the scale of each row is refitted in
closed form: the gain a = (w H q^T) / (q H q^T) minimises (w - a q) H (w - a q)^T.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.outliers.base import OutlierRule
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.scales.base import Grid
from quattuor.solvers.base import Solution, Solver, hessian_error, require_statistic
from quattuor.solvers.captured import run_captured
from quattuor.solvers.column_feedback import GPTQ

__all__ = ["CoordinateDescent"]

COLUMN_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinateDescent(Solver):
    """Start from another solver's codes, then alternate row gains and passes over the columns.

    Every step is the exact minimum over what it changes, on the damped Hessian, so the damped error never rises.

    Args:
        start: Gives the first codes.
        num_passes: Passes over all columns.
        refit: Refit the gain of each row before every pass and after the last. Needs a float32 scale per row.
        damping: Fraction of the mean diagonal added to the diagonal.

    References:
        Chee et al., 2023, arXiv:2307.13304, section 4 ("greedy updates").
    """

    start: Solver = field(default_factory=GPTQ)
    num_passes: int = 2
    refit: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Reject a number of passes or a damping that does nothing."""
        if self.num_passes < 1 or self.damping <= 0:
            raise InputError(
                compose(
                    subject="num_passes, damping",
                    value=(self.num_passes, self.damping),
                    constraint="are out of range",
                    place="CoordinateDescent",
                    remedy="use num_passes >= 1 and damping > 0",
                )
            )

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian, and what the first solver needs."""
        return self.start.needs | {"hessian"}

    @property
    def rows_interact(self) -> bool:
        """As for the first solver."""
        return self.start.rows_interact

    def solve(
        self,
        weight: Float[Tensor, "N K"],
        grid: Grid,
        statistics: Mapping[str, Tensor],
        outliers: OutlierRule | None = None,
    ) -> Solution:
        """Return the improved weight."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        hessian_KK = require_statistic(weight, statistics, "hessian", "CoordinateDescent")
        first = self.start.solve(weight, grid, statistics)
        if first.tensor.input_map is not None:
            raise UnsupportedError(
                compose(
                    subject="start",
                    value=self.start,
                    constraint="stores the columns in an order of its own, which the passes do not follow",
                    place="CoordinateDescent",
                    remedy='use GPTQ with order="natural" or groups="static" as the start',
                )
            )
        damped_KK = hessian_KK.clone()
        damped_KK.diagonal().add_(self.damping * hessian_KK.diagonal().mean())
        tensor = first.tensor
        for _ in range(self.num_passes):
            tensor = self._refit(weight, tensor, damped_KK)
            tensor = self._descend(weight, tensor, damped_KK)
        tensor = self._refit(weight, tensor, damped_KK)
        error = hessian_error(weight, tensor.decode(), hessian_KK)
        return Solution(tensor=tensor, error=error, notes=first.notes)

    def _refit(
        self, weight: Float[Tensor, "N K"], tensor: QuantizedTensor, hessian: Float[Tensor, "K K"]
    ) -> QuantizedTensor:
        """Multiply each row by its best gain, through the float32 scale that the whole row shares."""
        name = "channel_scale" if "channel_scale" in tensor.parameters else "scale"
        if not self.refit or name not in tensor.parameters:
            return tensor
        scale = tensor.parameters[name]
        if scale.dtype != torch.float32 or scale.shape[0] != weight.shape[0]:
            return tensor
        decoded_NK = tensor.decode().to(weight.dtype)
        image_NK = decoded_NK @ hessian
        energy_N = (image_NK * decoded_NK).sum(dim=1)
        gain_N = torch.where(energy_N > 0, (image_NK * weight).sum(dim=1) / energy_N, torch.ones_like(energy_N))
        gain_N = torch.where(gain_N > 0, gain_N, torch.ones_like(gain_N))
        parameters = Parameters(**{**tensor.parameters, name: scale * gain_N[:, None].to(scale.dtype)})
        return QuantizedTensor(
            packed=tensor.packed,
            parameters=parameters,
            number_format=tensor.number_format,
            granularity=tensor.granularity,
            shape=tensor.shape,
        )

    def _descend(
        self, weight: Float[Tensor, "N K"], tensor: QuantizedTensor, hessian: Float[Tensor, "K K"]
    ) -> QuantizedTensor:
        """Run one pass over the columns, those of largest diagonal first."""
        num_columns, number_format = weight.shape[1], tensor.number_format
        group_size = num_columns // tensor.granularity.num_groups(num_columns)
        order_K = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        columns = tensor.parameters.columns(order_K // group_size)
        hessian_KK = hessian[order_K][:, order_K]
        decoded_NK = tensor.decode().to(weight.dtype)[:, order_K]
        gradient_NK = (weight[:, order_K] - decoded_NK) @ hessian_KK
        codes = []
        for start in range(0, num_columns, COLUMN_BLOCK):
            stop = min(start + COLUMN_BLOCK, num_columns)
            block = columns.slice(start, stop)
            codes_NB, change_NB = run_captured(
                improve_columns,
                (number_format, tuple(block)),
                decoded_NK[:, start:stop],
                gradient_NK[:, start:stop],
                hessian_KK[start:stop, start:stop],
                *block.values(),
            )
            gradient_NK[:, stop:].addmm_(change_NB, hessian_KK[start:stop, stop:], alpha=-1)
            codes.append(codes_NB)
        codes_NK = torch.empty(weight.shape, dtype=codes[0].dtype, device=weight.device)
        codes_NK[:, order_K] = torch.cat(codes, dim=1)
        return QuantizedTensor.from_codes(codes_NK, tensor.parameters, number_format, tensor.granularity)


def improve_columns(
    number_format: Format,
    names: tuple[str, ...],
    decoded: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    *parameters: Tensor,
) -> tuple[Tensor, ...]:
    """Move the columns of a block in turn to the best numbers of their grid.

    Args:
        number_format: Encodes and decodes a column.
        names: Names of `parameters`, each [R, B] or [R, 1].
        decoded: The block as it stands, [N, B].
        gradient: Its part of (W - Q) H, [N, B].
        hessian: Its part of H, [B, B].
        parameters: What the format reads, column by column.

    Returns:
        New codes, and new minus old values, each [N, B].
    """
    columns = Parameters(**dict(zip(names, parameters, strict=True)))
    gradient_NB, codes, changes = gradient.clone(), [], []
    for k in range(decoded.shape[1]):
        group = columns.group(k)
        target_N = decoded[:, k] + gradient_NB[:, k] / hessian[k, k]
        codes_N11 = number_format.encode(target_N[:, None, None], group)
        change_N = number_format.decode(codes_N11, group).view(-1).to(decoded.dtype) - decoded[:, k]
        gradient_NB[:, k + 1 :].addr_(change_N, hessian[k, k + 1 :], alpha=-1)
        codes.append(codes_N11.view(-1))
        changes.append(change_N)
    return torch.stack(codes, dim=1), torch.stack(changes, dim=1)
