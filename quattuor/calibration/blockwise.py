# SPDX-License-Identifier: Apache-2.0
"""Runs one decoder block at a time and hands its outputs on to the next.

Only the block at hand has to be in memory. What a block receives beside the hidden state (masks, rotary tables)
does not depend on other blocks, so it is recorded once, from a pass of one sequence through a model whose blocks
return their input.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from quattuor.calibration.statistics import make_statistics
from quattuor.errors import CalibrationError, InputError, compose
from quattuor.models import DecoderDescription, Site, returns_tuple

__all__ = ["BlockRunner", "Hidden", "capture_inputs"]

Hidden = list[Float[Tensor, "_ T K"]]


class _StopForward(Exception):
    """Ends a forward pass whose remainder is not needed."""


class BlockRunner:
    """Calls decoder blocks the way their model does.

    Args:
        description: The architecture.
        arguments: For each block, the keyword arguments its model passes for one sequence; they broadcast over
            sequences.
    """

    def __init__(self, description: DecoderDescription, arguments: Sequence[dict[str, Any]]) -> None:
        """Keep the recorded arguments."""
        self.description = description
        self._arguments = list(arguments)

    def arguments(self, block_index: int, device: torch.device) -> dict[str, Any]:
        """Return the keyword arguments of a block, with tensors on `device`."""
        return {name: _to(value, device) for name, value in self._arguments[block_index].items()}

    @torch.no_grad()
    def run(self, block: nn.Module, block_index: int, hidden: Hidden) -> Hidden:
        """Return the block's outputs, each on the device its input was on.

        Raises:
            CalibrationError: An output is not finite.
        """
        if not hidden:
            return []
        device = _device_of(block)
        arguments = self.arguments(block_index, device)
        outputs: Hidden = []
        for batch in hidden:
            output = block(batch.to(device), **arguments)
            output = output[0] if isinstance(output, tuple) else output
            if not bool(torch.isfinite(output).all()):
                raise CalibrationError(
                    compose(
                        subject="hidden state",
                        value="NaN or infinity",
                        constraint="is not finite",
                        place=f"{self.description.blocks}.{block_index}",
                        remedy="check the model's weights, and compute in float32",
                    )
                )
            outputs.append(output.to(batch.device))
        return outputs

    @torch.no_grad()
    def visit(
        self,
        block: nn.Module,
        block_index: int,
        hidden: Hidden,
        visitors: dict[str, Callable[[Tensor], None]],
    ) -> None:
        """Show the input of linears to visitors, and end each pass once all of them have seen it.

        Args:
            block: The block.
            block_index: Its place in the model.
            hidden: Its inputs, batch by batch.
            visitors: For each path of a linear inside the block, what to call with its input.
        """
        device = _device_of(block)
        arguments = self.arguments(block_index, device)
        with ExitStack() as stack:
            waiting: set[str] = set()
            for path, visitor in visitors.items():
                hook = _visiting_hook(path, visitor, waiting)
                handle = block.get_submodule(path).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            for batch in hidden:
                waiting.update(visitors)
                with suppress(_StopForward):
                    block(batch.to(device), **arguments)

    def collect(
        self,
        block: nn.Module,
        block_index: int,
        hidden: Hidden,
        needs: dict[Site, frozenset[str]],
        prepare: Callable[[Tensor], Tensor] | None = None,
        original: tuple[nn.Module, Hidden] | None = None,
    ) -> dict[Site, dict[str, Tensor]]:
        """Return the statistics that each site needs, in one pass.

        Args:
            block: The block.
            block_index: Its place in the model.
            hidden: Its inputs, batch by batch.
            needs: Names of statistics per site; sites that need none are left out of the pass.
            prepare: Applied to the site's tokens first, e.g. the rounding that the layer will see.
            original: The original block and its inputs, for statistics that compare with them.
        """
        accumulators = {site: make_statistics(names) for site, names in needs.items() if names}
        sites = {site.consumers[0]: site for site in accumulators}
        for position, batch in enumerate(hidden if accumulators else []):
            before: dict[str, Tensor] = {}
            if original is not None:
                keep = {path: _keeper(before, path) for path in sites}
                self.visit(original[0], block_index, [original[1][position]], keep)
            seen: dict[str, Tensor] = {}
            self.visit(block, block_index, [batch], {path: _keeper(seen, path) for path in sites})
            for path, site in sites.items():
                tokens = seen[path] if prepare is None else prepare(seen[path])
                for statistic in accumulators[site].values():
                    statistic.update(tokens, before.get(path))
        results: dict[Site, dict[str, Tensor]] = {site: {} for site in needs}
        for site, statistics in accumulators.items():
            results[site] = {name: statistic.result() for name, statistic in statistics.items()}
        return results

    def site_inputs(
        self, block: nn.Module, block_index: int, hidden: Hidden, site: Site
    ) -> list[Float[Tensor, "_ T N"]]:
        """Return what a site's consumers read, batch by batch; sequences stay apart where a block joins them."""
        collected: list[Tensor] = []
        self.visit(block, block_index, hidden, {site.consumers[0]: collected.append})
        pairs = zip(collected, hidden, strict=True)
        return [x.to(batch.device).reshape(*batch.shape[:-1], -1) for x, batch in pairs]

    @torch.no_grad()
    def intercept(
        self,
        module: nn.Module,
        target: nn.Module,
        x: Float[Tensor, "B T K"],
        arguments: dict[str, Any],
    ) -> Tensor:
        """Run a submodule of a block on x and return the input of a linear inside it."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])
            raise _StopForward

        handle = target.register_forward_pre_hook(hook)
        try:
            module(x, **arguments)
        except _StopForward:
            pass
        finally:
            handle.remove()
        return seen[0]


@torch.no_grad()
def capture_inputs(
    model: PreTrainedModel,
    description: DecoderDescription,
    tokens: Int64[Tensor, "_ T"],
    *,
    batch_size: int,
    device: torch.device,
    storage: torch.device,
) -> tuple[Hidden, BlockRunner]:
    """Run the embeddings and record what each block receives.

    Args:
        model: A causal language model; its blocks' parameters are not touched and may be on the meta device.
        description: Its architecture.
        tokens: Calibration sequences of equal length, without padding.
        batch_size: Sequences per batch.
        device: Where the embeddings are.
        storage: Where hidden states are kept between blocks.

    Raises:
        InputError: The batch size is not positive.
    """
    if batch_size < 1:
        problem, remedy = "is not positive", "use 1 or more sequences per forward pass"
        place = "capture_inputs"
        message = compose(subject="batch_size", value=batch_size, constraint=problem, place=place, remedy=remedy)
        raise InputError(message)
    blocks = list(model.get_submodule(description.blocks).children())
    recorded: list[dict[str, Any]] = [{} for _ in blocks]
    hidden: Hidden = []
    shape: list[bool] = []  # whether blocks return tuples, once known

    def record(index: int) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *positional: Any, **keywords: Any) -> Any:
            if positional:
                raise AssertionError(f"block {index} received positional arguments beside the hidden state")
            recorded[index] = {
                name: value
                for name, value in keywords.items()
                if name not in ("past_key_values", "past_key_value", "use_cache", "output_attentions")
            }
            if index == len(blocks) - 1:
                raise _StopForward
            if not shape:
                shape.append(_returns_tuple(description, blocks[index], hidden_states, recorded[index]))
            return (hidden_states,) if shape[0] else hidden_states

        return forward

    def keep(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        hidden.append(hidden_states.to(storage))
        raise _StopForward

    decoder = model.get_decoder()

    def start(batch: Tensor) -> None:
        with suppress(_StopForward):
            decoder(input_ids=batch.to(device), use_cache=False)

    with _forwards(blocks, [record(index) for index in range(len(blocks))]):
        start(tokens[:1])
    with _forwards(blocks[:1], [keep]):
        for batch in tokens.split(batch_size):
            start(batch)
    return hidden, BlockRunner(description, recorded)


def _returns_tuple(
    description: DecoderDescription, block: nn.Module, hidden_states: Tensor, keywords: dict[str, Any]
) -> bool:
    """Return what the description says, or look where versions of transformers differ."""
    known = description.block_returns_tuple
    return returns_tuple(block, hidden_states, keywords) if known is None else known


@contextmanager
def _forwards(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of modules for a while; attributes that the model reads stay in place."""
    previous = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.__dict__["forward"] = forward
        yield
    finally:
        for block, before in zip(blocks, previous, strict=True):
            if before is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = before


def _device_of(block: nn.Module) -> torch.device:
    """Return where a block is; one whose linears are packed may have buffers only."""
    return next(chain(block.parameters(), block.buffers())).device


def _visiting_hook(path: str, visitor: Callable[[Tensor], None], waiting: set[str]) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        visitor(arguments[0])
        waiting.discard(path)
        if not waiting:
            raise _StopForward

    return hook


def _keeper(store: dict[str, Tensor], path: str) -> Callable[[Tensor], None]:
    """Return a visitor that keeps a linear's input as rows of tokens."""

    def keep(x: Tensor) -> None:
        store[path] = x.reshape(-1, x.shape[-1])

    return keep


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value
