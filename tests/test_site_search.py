# SPDX-License-Identifier: Apache-2.0
"""Searching a block's sites: what the transform is shown, and that only its scales remain in the block."""

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
from tiny_models import FAMILIES, Float64, tiny_model

from quattuor.activations import DynamicQuantizer
from quattuor.calibration.blockwise import capture_inputs
from quattuor.errors import CalibrationError
from quattuor.folding import fold_scale_
from quattuor.formats import Integer
from quattuor.granularity import PerChannel
from quattuor.models import describe
from quattuor.quantize import quantize
from quattuor.recipe import Recipe
from quattuor.rules import Rule
from quattuor.scales import AbsMax
from quattuor.site_search import SiteSearch
from quattuor.solvers import WeightQuantizer
from quattuor.transforms import ActivationAwareScale, AdaptiveSmoothing, MigrateScale
from quattuor.transforms.base import SITES, SiteTransform
from quattuor.transforms.smoothing import round_weight

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 255, (4, 24), generator=torch.Generator().manual_seed(5))
W4A8 = (PerChannel(), 4, DynamicQuantizer())
SMOOTHING = AdaptiveSmoothing(num_candidates=12)
AWARE = ActivationAwareScale(num_steps=4, share_values=True)
PLAIN = Recipe(
    weights=WeightQuantizer(number_format=Integer(4), granularity=PerChannel(), scales=AbsMax()),
    activations=DynamicQuantizer(),
)


@dataclass(frozen=True, kw_only=True)
class Watcher(SiteTransform):
    """Keeps what it is shown, and its value of `evaluate`, and scales every site by two."""

    sites: tuple[str, ...] = SITES
    shown: list = field(default_factory=list)

    def find(self, problem):
        self.shown.append((problem, problem.evaluate(problem.inputs, problem.weight)))
        return torch.full_like(problem.abs_max, 2.0)


class Setting:
    """A model's blocks, sites and hidden states, and the search over them."""

    def __init__(self, model, choices=lambda site: W4A8):
        config = model.config.to_dict()
        self.description = describe(model.config)
        self.heads = self.description.heads(config)
        activation = self.description.activation(config)
        self.sites = self.description.sites(activation)
        self.blocks = list(model.get_submodule(self.description.blocks))
        self.hidden, self.runner = capture_inputs(
            model, self.description, TOKENS, batch_size=3, device=CPU, storage=CPU
        )
        self.search = SiteSearch(self.runner, self.heads, activation, choices)

    def run_(self, transform, index=0):
        return self.search.run_(self.blocks[index], index, self.hidden, self.sites, transform)

    def fold_(self, block, scales):
        for site in self.sites:
            if site.name in scales:
                fold_scale_(block, self.description, self.heads, site, scales[site.name])


def logits(model):
    with torch.no_grad(), Float64():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("transform", [SMOOTHING, AWARE], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_searched_scales_leave_the_function_as_it_was(family, transform):
    model = tiny_model(family, dtype=torch.float64)
    expected = logits(model)
    setting = Setting(model)
    for index, block in enumerate(setting.blocks):
        scales = setting.run_(transform, index)
        assert set(scales) == set(SITES)
        assert float(scales["qkv"].max()) > 2, "the planted outliers were smoothed"
        setting.hidden = setting.runner.run(block, index, setting.hidden)
    assert (logits(model) - expected).abs().max() / expected.abs().max() < 1e-10


@pytest.mark.parametrize(
    "transform",
    [SMOOTHING, AWARE, MigrateScale(sites=SITES), MigrateScale()],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "opt"])
def test_no_trace_of_the_rounding_is_left(tiny, family, transform):
    model = tiny(family)
    setting = Setting(model)
    expected = copy.deepcopy(setting.blocks[0])
    scales = setting.run_(transform)
    assert set(scales) == set(transform.sites)
    setting.fold_(expected, scales)
    found = dict(setting.blocks[0].named_parameters())
    for name, value in expected.named_parameters():
        assert torch.equal(found[name], value), name
    assert not any(module._forward_pre_hooks for module in setting.blocks[0].modules())


@dataclass(frozen=True, kw_only=True)
class BlindWatcher(Watcher):
    """A watcher that wants each site as the original block has it."""

    @property
    def sees_errors(self):
        return False


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "opt"])
def test_transforms_that_see_no_errors_are_shown_the_original_block(tiny, family):
    """Every site's inputs and weights are the block's own, and what is compared is the output of the module."""
    setting = Setting(tiny(family))
    block = copy.deepcopy(setting.blocks[0])
    outputs = {}

    def keep(name):
        return lambda _, arguments, output: outputs.update(
            {name: output[0] if isinstance(output, tuple) else output}
        )

    attention, mlp = setting.description.attention, setting.description.mlp
    modules = {"qkv": attention.module, "output": attention.output, "gate_up": mlp.module, "down": mlp.down}
    modules["gate_up"] = modules["gate_up"] or mlp.up  # a plain network without a module: its first linear
    for name, path in modules.items():
        block.get_submodule(path).register_forward_hook(keep(name))
    batches = [setting.runner.run(block, 0, [batch]) and dict(outputs) for batch in setting.hidden]
    watcher = BlindWatcher()
    setting.run_(watcher)
    assert len(watcher.shown) == len(SITES)
    for site, (problem, value) in zip(setting.sites, watcher.shown, strict=True):
        inputs = torch.cat(setting.runner.site_inputs(block, 0, setting.hidden, site))
        torch.testing.assert_close(problem.inputs, inputs, rtol=1e-5, atol=1e-5)
        weights = [block.get_submodule(path).weight for path in site.consumers]
        assert torch.equal(problem.weight, torch.cat(weights))
        expected = torch.cat(
            [
                batch[site.name].reshape(len(hidden), -1, value.shape[-1])
                for batch, hidden in zip(batches, setting.hidden, strict=True)
            ]
        )
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_replaying_found_scales_gives_the_same_weights(tiny):
    """A search result is a few vectors; folding them into the untouched block is the search without its cost."""
    setting = Setting(tiny("llama"))
    untouched = copy.deepcopy(setting.blocks[0])
    stored = {name: scale.clone() for name, scale in setting.run_(AWARE).items()}
    assert any(float(scale.max()) > 1.5 for scale in stored.values())
    setting.fold_(untouched, stored)
    for name, value in untouched.named_parameters():
        assert torch.equal(value, dict(setting.blocks[0].named_parameters())[name]), name


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gemma3_text"])
def test_smoothing_lowers_the_output_error(tiny, family):
    errors = {}
    with torch.no_grad():
        expected = tiny(family)(TOKENS).logits
    for name, transforms in (("plain", ()), ("smoothed", (SMOOTHING,))):
        model = tiny(family)
        quantize(model, replace(PLAIN, transforms=transforms), TOKENS)
        with torch.no_grad():
            errors[name] = float((model(TOKENS).logits - expected).square().mean() / expected.square().mean())
    assert errors["smoothed"] < 0.9 * errors["plain"], errors


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "opt"])
def test_first_site_is_shown_as_it_is(tiny, family):
    setting = Setting(tiny(family))
    block, site, following = copy.deepcopy(setting.blocks[0]), setting.sites[0], setting.sites[1]
    watcher = Watcher()
    setting.run_(watcher)
    problem, value = watcher.shown[0]
    assert torch.equal(problem.inputs, torch.cat(setting.runner.site_inputs(block, 0, setting.hidden, site)))
    assert torch.equal(problem.abs_max, problem.inputs.abs().amax((0, 1)))
    assert torch.equal(problem.weight, torch.cat([block.get_submodule(path).weight for path in site.consumers]))
    assert (problem.granularity, problem.bits, problem.activations) == W4A8
    assert problem.ties is None
    expected = torch.cat(setting.runner.site_inputs(block, 0, setting.hidden, following))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "opt"])
def test_later_sites_see_the_errors_of_earlier_ones(tiny, family):
    """The block is rounded and scaled by hand, site by site, and each problem compared with it."""
    setting = Setting(tiny(family))
    block = copy.deepcopy(setting.blocks[0])
    watcher = Watcher()
    setting.run_(watcher)
    assert len(watcher.shown) == len(SITES)
    for site, (problem, value) in zip(setting.sites, watcher.shown, strict=True):
        inputs = torch.cat(setting.runner.site_inputs(block, 0, setting.hidden, site))
        torch.testing.assert_close(problem.inputs, inputs, rtol=1e-5, atol=1e-5)
        linears = [block.get_submodule(path) for path in site.consumers]
        assert torch.equal(problem.weight, torch.cat([linear.weight for linear in linears]))
        if site.name in ("output", "down"):
            expected = torch.nn.functional.linear(inputs, linears[0].weight, linears[0].bias)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        elif site.name == "gate_up":
            expected = torch.cat(setting.runner.site_inputs(block, 0, setting.hidden, setting.sites[3]))
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        setting.fold_(block, {site.name: torch.full_like(problem.abs_max, 2.0)})
        for linear in linears:
            linear.weight.copy_(round_weight(linear.weight, PerChannel(), 4))
            linear.register_forward_pre_hook(lambda _, x: (DynamicQuantizer().fake_quantize(x[0]),))


def test_query_heads_of_a_kv_head_are_tied(tiny):
    setting = Setting(tiny("llama"))
    watcher = Watcher(sites=("output",))
    setting.run_(watcher)
    expected = torch.cat([torch.arange(head * 16, head * 16 + 16) for head in (0, 0, 1, 1)])
    assert torch.equal(watcher.shown[0][0].ties, expected)
    found = Setting(tiny("llama")).run_(MigrateScale(sites=("output",)))["output"].view(2, 2, 16)
    assert torch.equal(found[:, 0], found[:, 1])
    assert not torch.equal(found[0], found[1])


def test_sites_that_are_not_quantized_are_skipped(tiny):
    model = tiny("llama")
    setting = Setting(model, lambda site: None if site.name in ("output", "gate_up") else W4A8)
    before = copy.deepcopy(setting.blocks[0])
    watcher = Watcher()
    scales = setting.run_(watcher)
    assert set(scales) == {"qkv", "down"}
    assert len(watcher.shown) == 2
    assert torch.equal(setting.blocks[0].self_attn.o_proj.weight, before.self_attn.o_proj.weight)
    assert torch.equal(setting.blocks[0].mlp.gate_proj.weight, before.mlp.gate_proj.weight)
    assert not torch.equal(setting.blocks[0].mlp.up_proj.weight, before.mlp.up_proj.weight), (
        "produces what down reads"
    )


def test_site_outside_the_transform_is_rounded_for_later_ones_but_not_scaled(tiny):
    setting = Setting(tiny("llama"))
    before = copy.deepcopy(setting.blocks[0])
    watcher = Watcher(sites=("down",))
    assert set(setting.run_(watcher)) == {"down"}
    clean = torch.cat(setting.runner.site_inputs(before, 0, setting.hidden, setting.sites[3]))
    drift = (watcher.shown[0][0].inputs - clean).norm() / clean.norm()
    assert 0.01 < drift < 1
    assert torch.equal(setting.blocks[0].self_attn.q_proj.weight, before.self_attn.q_proj.weight)


def test_weights_alone_are_searched_with_exact_inputs(tiny):
    setting = Setting(tiny("llama"), lambda site: (PerChannel(), 4, None))
    watcher = Watcher()
    setting.run_(watcher)
    assert [problem.activations for problem, _ in watcher.shown] == [None] * 4


def test_half_precision_blocks_are_searched_in_float32(tiny):
    for family in ("llama", "opt"):
        setting = Setting(tiny(family).bfloat16())
        watcher = Watcher()
        setting.run_(watcher)
        for problem, value in watcher.shown:
            assert problem.inputs.dtype == problem.weight.dtype == value.dtype == torch.float32


@pytest.mark.parametrize("skipped", ["q_proj", "v_proj"])
def test_site_with_one_linear_kept_is_smoothed_for_the_others(tiny, skipped):
    model = tiny("llama")
    rules = (Rule(pattern=f"*.{skipped}", skip=True),)
    before = model.model.layers[0].input_layernorm.weight.clone()
    quantize(model, replace(PLAIN, transforms=(SMOOTHING,), rules=rules), TOKENS)
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, before)
    model = tiny("llama")
    quantize(
        model, replace(PLAIN, transforms=(SMOOTHING,), rules=(Rule(pattern="*.self_attn.*", skip=True),)), TOKENS
    )
    assert torch.equal(model.model.layers[0].input_layernorm.weight, before)


def test_failed_search_says_where_it_was(tiny):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    setting = Setting(model)
    with pytest.raises(CalibrationError, match=r"^model\.layers\.1\.gate_up: AdaptiveSmoothing: weight=1 entries"):
        setting.run_(SMOOTHING, 1)
