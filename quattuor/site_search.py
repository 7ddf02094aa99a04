# SPDX-License-Identifier: Apache-2.0
"""Runs site transforms on a block: turns each site into tensors, and folds what is found.

Sites are taken in forward order. Where the transform `sees_errors`, once a site is settled its consumers compute
with rounded weights and rounded inputs, and a site is measured by what the next one reads. Otherwise every site is
shown in the original block and measured by the output of its module. The block gets its original weights back at
the end, with all scales folded, so that the search leaves the block's function as it was.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.activations import ACT2FN

from quattuor.activations import ActivationQuantizer
from quattuor.calibration.blockwise import BlockRunner, Hidden
from quattuor.calibration.statistics import AbsMax
from quattuor.errors import CalibrationError
from quattuor.folding import fold_scale_, linear_at
from quattuor.granularity import Granularity
from quattuor.models import Heads, Site, SiteKind
from quattuor.transforms.base import SiteProblem, SiteTransform
from quattuor.transforms.smoothing import round_weight

__all__ = ["SiteSearch"]


class SiteSearch:
    """Finds and folds the site transforms of one block.

    Args:
        runner: Calls the block.
        heads: Its head counts.
        activation: Name of the feed-forward activation.
        choices: For each site, the granularity and width of its weights and its activation quantizer, or None
            when the site is not quantized.
    """

    def __init__(
        self,
        runner: BlockRunner,
        heads: Heads,
        activation: str,
        choices: Callable[[Site], tuple[Granularity, int, ActivationQuantizer | None] | None],
    ) -> None:
        """Keep the block's surroundings."""
        self.runner = runner
        self.description = runner.description
        self.heads = heads
        self.activation = activation
        self.choices = choices

    @torch.no_grad()
    def run_(
        self,
        block: nn.Module,
        block_index: int,
        hidden: Hidden,
        sites: Sequence[Site],
        transform: SiteTransform,
    ) -> dict[str, Float[Tensor, " _"]]:
        """Find a scale at each of the transform's sites, fold them all, and return them by site name."""
        original = {name: value.detach().clone() for name, value in block.named_parameters()}
        found: list[tuple[Site, Tensor]] = []
        with ExitStack() as stack:
            for site in sites:
                choice = self.choices(site)
                if choice is None:
                    continue
                if site.name in transform.sites:
                    problem = self._problem(block, block_index, hidden, site, choice, transform.sees_errors)
                    scale = _find(transform, problem, f"{self.description.blocks}.{block_index}.{site.name}")
                    found.append((site, scale))
                if not transform.sees_errors:
                    continue
                if site.name in transform.sites:
                    fold_scale_(block, self.description, self.heads, site, scale)
                _degrade_(block, site, choice, stack)
        for name, value in block.named_parameters():
            value.data.copy_(original[name])
        for site, scale in found:
            fold_scale_(block, self.description, self.heads, site, scale)
        return {site.name: scale for site, scale in found}

    def _problem(
        self,
        block: nn.Module,
        block_index: int,
        hidden: Hidden,
        site: Site,
        choice: tuple[Granularity, int, ActivationQuantizer | None],
        sees_errors: bool,
    ) -> SiteProblem:
        """Describe a site by its tensors. The consumers are not rounded yet, so theirs is the original weight."""
        granularity, bits, activations = choice
        inputs = torch.cat(self.runner.site_inputs(block, block_index, hidden, site)).float()
        statistic = AbsMax()
        statistic.update(inputs.reshape(-1, inputs.shape[-1]))
        device = next(block.parameters()).device
        linears = [linear_at(block, path) for path in site.consumers]
        return SiteProblem(
            inputs=inputs,
            weight=torch.cat([linear.weight for linear in linears]).float(),
            evaluate=self._evaluate(block, block_index, site, device, next_input=sees_errors),
            abs_max=statistic.result().to(device),
            ties=self._ties(site, device),
            granularity=granularity,
            bits=bits,
            activations=activations,
        )

    def _ties(self, site: Site, device: torch.device) -> Int64[Tensor, " K"] | None:
        """Tie the channels of query heads that read the same value head."""
        if site.kind is not SiteKind.VALUE_OUTPUT:
            return None
        heads = self.heads
        kv_head = torch.arange(heads.num_heads, device=device) // (heads.num_heads // heads.num_kv_heads)
        channel = torch.arange(heads.head_dim, device=device)
        return (kv_head[:, None] * heads.head_dim + channel).reshape(-1)

    def _evaluate(
        self, block: nn.Module, block_index: int, site: Site, device: torch.device, *, next_input: bool
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return f(inputs, weight): what the next site reads, or the output of the module or linear."""
        attention, mlp = self.description.attention, self.description.mlp
        assert attention is not None, "only described sites have a transform"
        assert mlp is not None, "only described sites have a transform"
        linears = [linear_at(block, path) for path in site.consumers]
        if site.name == "qkv":
            module, target = block.get_submodule(attention.module), block.get_submodule(attention.output)
            arguments = self.runner.arguments(block_index, device)
        elif site.name == "gate_up" and mlp.module is not None:
            module, target, arguments = block.get_submodule(mlp.module), block.get_submodule(mlp.down), {}
        else:
            return self._linear(linears[0], site.name == "gate_up" and next_input)

        def run(inputs: Tensor, weight: Tensor) -> Tensor:
            with _weights(linears, weight):
                x = inputs.to(linears[0].weight.dtype)
                value = self.runner.intercept(module, target, x, arguments)
                return value.float() if next_input else target(value).float()

        return run

    def _linear(self, linear: nn.Linear, activates: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """Return inputs @ weight.T + bias, through the activation for the first layer of a plain network."""
        activation = ACT2FN[self.activation] if activates else nn.Identity()

        def run(inputs: Tensor, weight: Tensor) -> Tensor:
            bias = None if linear.bias is None else linear.bias.to(inputs.dtype)
            result: Tensor = activation(nn.functional.linear(inputs, weight, bias))
            return result

        return run


def _find(transform: SiteTransform, problem: SiteProblem, place: str) -> Tensor:
    """Run the search; say where it was when it cannot."""
    try:
        return transform.find(problem)
    except CalibrationError as error:
        raise CalibrationError(f"{place}: {error}") from error


class _weights:
    """Puts rows of a stacked weight into linears for a while."""

    def __init__(self, linears: Sequence[nn.Linear], stacked: Tensor) -> None:
        """Cut the stack into the linears' rows."""
        self.linears = linears
        self.parts = torch.split(stacked, [linear.out_features for linear in linears])
        self.before = [linear.weight.data for linear in linears]

    def __enter__(self) -> None:
        """Put them in."""
        for linear, part in zip(self.linears, self.parts, strict=True):
            linear.weight.data = part.to(linear.weight.dtype)

    def __exit__(self, *_: object) -> None:
        """Put the originals back."""
        for linear, weight in zip(self.linears, self.before, strict=True):
            linear.weight.data = weight


def _degrade_(
    block: nn.Module,
    site: Site,
    choice: tuple[Granularity, int, ActivationQuantizer | None],
    stack: ExitStack,
) -> None:
    """Round a site's weights in place and its inputs while the stack is open."""
    granularity, bits, activations = choice
    for path in site.consumers:
        linear = linear_at(block, path)
        linear.weight.data.copy_(round_weight(linear.weight.float(), granularity, bits))
        if activations is not None:
            handle = linear.register_forward_pre_hook(_rounding_hook(activations))
            stack.callback(handle.remove)


def _rounding_hook(activations: ActivationQuantizer) -> Callable[..., tuple[Tensor, ...]]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rounded = activations.fake_quantize(inputs[0].float()).to(inputs[0].dtype)
        return (rounded, *inputs[1:])

    return hook
