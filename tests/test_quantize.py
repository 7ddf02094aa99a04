# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline on tiny models: what it computes, reports, leaves alone and refuses."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, OlmoConfig

from quattuor.activations import DynamicQuantizer
from quattuor.errors import CalibrationError, InputError, UnsupportedError
from quattuor.formats import Integer
from quattuor.granularity import PerChannel
from quattuor.models import describe
from quattuor.nn.linear import QuantizedLinear
from quattuor.progress import Progress
from quattuor.quantize import InMemory, quantize
from quattuor.recipe import Recipe
from quattuor.rules import Rule
from quattuor.scales import AbsMax
from quattuor.seeds import derive_seed
from quattuor.solvers import GPTQ, Nearest, Solver, WeightQuantizer
from quattuor.systems import qqq, rtn
from quattuor.transforms import AdaptiveSmoothing

TOKENS = torch.randint(0, 255, (6, 32), generator=torch.Generator().manual_seed(1))
UNSEEN = torch.randint(0, 255, (4, 32), generator=torch.Generator().manual_seed(2))
FAST = {"clip": "none", "num_passes": 0}
SMOOTHING = AdaptiveSmoothing(num_candidates=8)
W4A8_RTN = rtn(group_size=None, activation_bits=8)


def gptq(**fields):
    """Return plain GPTQ with int8 tokens, per channel."""
    weights = WeightQuantizer(
        number_format=Integer(4), granularity=PerChannel(), scales=AbsMax(), solver=fields.pop("solver", GPTQ())
    )
    return Recipe(weights=weights, activations=DynamicQuantizer(), **fields)


def quick(recipe):
    """Search smoothing thresholds on a coarse grid."""
    transforms = [t if not isinstance(t, AdaptiveSmoothing) else SMOOTHING for t in recipe.transforms]
    return replace(recipe, transforms=tuple(transforms))


def packed_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def stored(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    """Return whether two stored models are the same bytes."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def run(tiny, recipe, family="llama", tokens=TOKENS, **options):
    model = tiny(family)
    quantize(model, recipe, tokens, **options)
    return model


def share_of_equal_codes(one, other):
    pairs = [(one[name].tensor.codes, other[name].tensor.codes) for name in one]
    return sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@torch.no_grad()
def output_error(model, original):
    expected = original(UNSEEN).logits
    return float((model(UNSEEN).logits - expected).square().sum() / expected.square().sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorder(Solver):
    """Rounds to nearest and keeps the statistics it was given."""

    names: frozenset = frozenset({"hessian"})
    seen: list = field(default_factory=list)

    @property
    def needs(self):
        return self.names

    def solve(self, weight, grid, statistics, outliers=None):
        self.seen.append(dict(statistics))
        return Nearest().solve(weight, grid, {})


@torch.no_grad()
def inputs_of(model, tokens=TOKENS):
    """Return what each site of each block reads in a plain forward pass, as rows of tokens, in order."""
    description = describe(model.config)
    sites = description.sites(description.activation(model.config.to_dict()))
    seen, handles = {}, []
    for block in model.get_submodule(description.blocks):
        for site in sites:
            linear = block.get_submodule(site.consumers[0])
            handles.append(
                linear.register_forward_pre_hook(lambda module, x: seen.update({module: x[0].flatten(0, -2)}))
            )
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return list(seen.values())


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    return True


@pytest.mark.parametrize(
    ("family", "options", "factor"),
    [
        ("llama", {}, 0.6),
        ("llama", {"group_size": 32}, 1.0),
        ("llama", {"rotation": False, "smoothing": True, **FAST}, 0.8),
        ("opt", {"rotation": False, "smoothing": True, **FAST}, 0.8),
    ],
    ids=["rotation", "groups", "smoothing", "opt"],
)
def test_qqq_beats_rounding_on_unseen_tokens(tiny, family, options, factor):
    group_size = options.get("group_size")
    rounded = run(tiny, rtn(group_size=group_size, activation_bits=8), family)
    model = run(tiny, quick(qqq(**options)), family)
    assert output_error(model, tiny(family)) < factor * output_error(rounded, tiny(family))


def test_compensation_is_worse_in_weights_and_better_in_outputs(tiny):
    """The paper's claim about GPTQ, on every linear of the first block."""
    original, rounded, compensated = tiny("llama"), run(tiny, gptq(solver=Nearest())), run(tiny, gptq())
    inputs = dict(zip(("q_proj", "o_proj", "gate_proj", "down_proj"), inputs_of(original), strict=False))
    for name, module in packed_of(compensated).items():
        path = name.rpartition(".")[2]
        if not name.startswith("model.layers.0") or path not in inputs:
            continue
        weight = original.get_submodule(name).weight.detach()
        losses = [packed.tensor.decode() - weight for packed in (packed_of(rounded)[name], module)]
        assert losses[1].norm() > losses[0].norm(), name
        assert (inputs[path] @ losses[1].T).norm() < (inputs[path] @ losses[0].T).norm(), name


@pytest.mark.parametrize(
    "recipe", [qqq(**FAST), qqq(group_size=32, smoothing=True, sequential=True, **FAST)], ids=["rotation", "all"]
)
def test_the_same_run_gives_the_same_bytes(tiny, recipe):
    recipe = quick(recipe)
    assert same(stored(run(tiny, recipe, seed=3)), stored(run(tiny, recipe, seed=3)))


def test_batch_size_changes_rounding_alone(tiny):
    recipe = qqq(**FAST)
    one, other = (packed_of(run(tiny, recipe, batch_size=size)) for size in (1, 4))
    assert share_of_equal_codes(one, other) >= 0.999


def test_seed_chooses_the_rotation(tiny):
    one, other = (run(tiny, qqq(**FAST), seed=seed) for seed in (0, 1))
    assert share_of_equal_codes(packed_of(one), packed_of(other)) < 0.5
    assert not torch.allclose(one.model.embed_tokens.weight, other.model.embed_tokens.weight, atol=0.1)
    without = [stored(run(tiny, gptq(), seed=seed)) for seed in (0, 1)]
    assert same(*without), "nothing else is random"


def test_derived_seeds_differ_by_run_and_by_purpose():
    seeds = {derive_seed(seed, name) for seed in range(3) for name in ("RotateResidual", "RotateHeads")}
    assert len(seeds) == 6
    assert derive_seed(0, "RotateResidual") == derive_seed(0, "RotateResidual")
    torch.Generator().manual_seed(max(seeds))


def test_recipe_without_data_runs_no_forward_pass(tiny):
    model = tiny("llama")

    def refuse(module, _):
        raise AssertionError(f"{type(module).__name__} ran")

    for module in model.modules():
        module.register_forward_pre_hook(refuse)
    report = quantize(model, W4A8_RTN, None)
    assert len(report.layers) == len(packed_of(model)) == 14
    assert report.num_tokens == 0


@pytest.mark.parametrize("recipe", [qqq(), Recipe(transforms=(AdaptiveSmoothing(),))], ids=["solver", "transform"])
@pytest.mark.parametrize("tokens", [None, torch.zeros(0, 8, dtype=torch.int64)], ids=["none", "empty"])
def test_missing_data_is_refused(tiny, recipe, tokens):
    with pytest.raises(
        CalibrationError, match=r"quantize: tokens=.* hold no calibration sequence; pass at least one"
    ):
        quantize(tiny("llama"), recipe, tokens)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_original_inputs_are_those_of_the_original_model(tiny, family):
    recorder = Recorder()
    run(tiny, gptq(solver=recorder, inputs="original"), family)
    expected = inputs_of(tiny(family))
    assert len(recorder.seen) == len(expected) == 8
    assert all(close(seen["hessian"], x.T @ x / len(x)) for seen, x in zip(recorder.seen, expected, strict=True))


@pytest.mark.parametrize("rounds", [False, True], ids=["quantized", "rounded"])
def test_sequential_statistics_are_those_of_the_finished_model(tiny, rounds):
    """Site by site, a layer's Hessian is that of the tokens which it reads when everything is done."""
    recorder = Recorder()
    inputs = "rounded" if rounds else "quantized"
    model = run(tiny, gptq(solver=recorder, inputs=inputs, sequential=True))
    assert len(recorder.seen) == 8
    for seen, x in zip(recorder.seen, inputs_of(model), strict=True):
        v = DynamicQuantizer().fake_quantize(x) if rounds else x
        assert close(seen["hessian"], v.T @ v / len(v))


def test_without_sequential_a_block_is_seen_whole(tiny):
    """The first block's statistics are the original's; the second block's begin with the first one quantized."""
    recorder = Recorder()
    model = run(tiny, gptq(solver=recorder, inputs="quantized"))
    finished, original = inputs_of(model), inputs_of(tiny("llama"))
    for index in range(4):
        assert close(recorder.seen[index]["hessian"], original[index].T @ original[index] / TOKENS.numel())
    assert close(recorder.seen[4]["hessian"], finished[4].T @ finished[4] / TOKENS.numel())
    with pytest.raises(AssertionError):
        close(recorder.seen[4]["hessian"], original[4].T @ original[4] / TOKENS.numel())


def test_correlations_pair_original_and_present_tokens():
    """In the third block both streams have passed a block whose inputs differed already."""
    recorder = Recorder(names=frozenset({"hessian", "cross"}))
    original, model = (tiny_model("llama", num_hidden_layers=3) for _ in range(2))
    quantize(model, gptq(solver=recorder, sequential=True), TOKENS, batch_size=4)
    for seen, x, v in zip(recorder.seen, inputs_of(original), inputs_of(model), strict=True):
        assert close(seen["cross"], x.T @ v / len(x))
        assert close(seen["hessian"], v.T @ v / len(v))
    with pytest.raises(AssertionError):
        close(recorder.seen[11]["cross"], recorder.seen[11]["hessian"])


def test_input_policies_change_what_is_solved(tiny):
    solved = {
        (inputs, sequential): packed_of(run(tiny, gptq(inputs=inputs, sequential=sequential)))
        for inputs, sequential in (
            ("original", False),
            ("quantized", False),
            ("rounded", False),
            ("quantized", True),
        )
    }

    def equal(one, other, name):
        return torch.equal(*(solved[key][name].tensor.codes for key in (one, other)))

    first, later = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    assert equal(("original", False), ("quantized", False), first), "nothing was quantized before it"
    assert equal(("quantized", False), ("quantized", True), first)
    keys = list(solved)
    for index, one in enumerate(keys):
        assert not any(equal(one, other, later) for other in keys[index + 1 :]), one


def test_target_correction_lowers_the_error_on_enough_tokens(tiny):
    tokens = torch.randint(0, 255, (64, 32), generator=torch.Generator().manual_seed(3))
    plain = run(tiny, qqq(sequential=True, **FAST), tokens=tokens)
    corrected = run(tiny, qqq(sequential=True, correct_targets=True, **FAST), tokens=tokens)
    assert output_error(corrected, tiny("llama")) < 0.95 * output_error(plain, tiny("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_report_tells_every_linear_once(tiny, family):
    model = tiny(family)
    recipe = gptq()
    report = quantize(model, recipe, TOKENS)
    packed = packed_of(model)
    assert sorted(layer.name for layer in report.layers) == sorted(packed)
    for layer in report.layers:
        tensor = packed[layer.name].tensor
        assert layer.num_weights == tensor.shape[0] * tensor.shape[1]
        buffers = [value for name, value in packed[layer.name].named_buffers() if name != "bias"]
        bits = 8 * sum(value.numel() * value.element_size() for value in buffers) / layer.num_weights
        assert layer.bits_per_weight == pytest.approx(bits)
        assert layer.number_format == str(recipe.weights.number_format)
        assert 0 < layer.error < 0.2
        assert layer.seconds > 0
    assert (report.num_tokens, report.blocks) == (TOKENS.numel(), 2)
    assert report.seconds.keys() == {"ends", "embed", "rotate", "smooth", "propagate", "collect", "solve"}
    assert all(report.seconds[name] > 0 for name in report.seconds)
    assert report.peak_memory_bytes > 2**20
    assert report.to_dict()["layers"][0]["name"] == report.layers[0].name


def test_reported_error_is_that_of_the_outputs(tiny):
    model, original = tiny("llama"), tiny("llama")
    report = quantize(model, gptq(inputs="original"), TOKENS)
    for x, name in zip(inputs_of(original)[:4], ("q_proj", "o_proj", "gate_proj", "down_proj"), strict=True):
        layer = next(
            layer
            for layer in report.layers
            if layer.name.endswith(f"0.self_attn.{name}" if name in ("q_proj", "o_proj") else f"0.mlp.{name}")
        )
        weight = original.get_submodule(layer.name).weight.detach()
        error = x @ (packed_of(model)[layer.name].tensor.decode() - weight).T
        assert layer.error == pytest.approx(float(error.square().sum() / (x @ weight.T).square().sum()), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_touches_the_linears_of_the_blocks_alone(tiny, family):
    model, original = run(tiny, W4A8_RTN, family, None), tiny(family)
    packed = packed_of(model)
    expected = {name: p for name, p in original.named_parameters() if name.rpartition(".")[0] not in packed}
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert model.config.tie_word_embeddings == original.config.tie_word_embeddings
    assert isinstance(model.get_output_embeddings(), nn.Linear)


def test_skipped_linears_stay_as_they_are(tiny):
    rules = (Rule(pattern="model.layers.0.*", skip=True), Rule(pattern="*.down_proj", skip=True))
    model, original = tiny("llama"), tiny("llama")
    report = quantize(model, gptq(rules=rules), TOKENS)
    assert len(report.layers) == 6
    assert all(name.startswith("model.layers.1.") for name in packed_of(model))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert torch.equal(model.get_submodule(name).weight, original.get_submodule(name).weight)


def test_linears_of_one_site_may_differ(tiny):
    """What shares an input is solved together only where the recipe says the same of it."""
    eight = replace(gptq().weights, number_format=Integer(8))
    model = run(tiny, gptq(rules=(Rule(pattern="*.v_proj", weights=eight),)))
    bits = {name.rpartition(".")[2]: m.layout.number_format.bits for name, m in packed_of(model).items()}
    assert bits == dict.fromkeys(bits, 4) | {"v_proj": 8}
    alone = run(tiny, gptq())
    for path in ("q_proj", "k_proj"):
        name = f"model.layers.0.self_attn.{path}"
        assert torch.equal(packed_of(model)[name].tensor.codes, packed_of(alone)[name].tensor.codes)


def undescribed():
    """Return a decoder without description whose blocks have no parameters beside their linears."""
    config = OlmoConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("recipe", [W4A8_RTN, qqq(rotation=False, **FAST)], ids=["rtn", "qqq"])
def test_discovered_architecture_is_quantized_without_transforms(recipe):
    model, original = undescribed(), undescribed()
    report = quantize(model, recipe, TOKENS)
    assert len(report.layers) == len(packed_of(model)) == 14
    assert 0 < output_error(model, original) < 0.1


@pytest.mark.parametrize("recipe", [qqq(), qqq(rotation=False, smoothing=True)], ids=["rotation", "smoothing"])
def test_discovered_architecture_takes_no_transform(recipe):
    with pytest.raises(UnsupportedError, match=r"model_type=olmo has no description.*quantize without transforms"):
        quantize(undescribed(), recipe, TOKENS)


class Ledger(InMemory):
    """Notes which modules come and go."""

    def __init__(self):
        self.calls = []

    def load_(self, module, prefix):
        self.calls.append(("load", prefix))

    def emit(self, module, prefix):
        assert not any(isinstance(linear, nn.Linear) for linear in module.modules()) or prefix == "lm_head"
        self.calls.append(("emit", prefix))


def test_one_block_at_a_time_is_loaded_and_handed_on(tiny):
    ledger = Ledger()
    run(tiny, gptq(), store=ledger)
    ends = ["model.embed_tokens", "model.norm", "lm_head"]
    blocks = ["model.layers.0", "model.layers.1"]
    expected = [("load", path) for path in ends] + [("emit", path) for path in ends]
    assert ledger.calls == expected + [(call, path) for path in blocks for call in ("load", "emit")]


class Steps(Progress):
    """Notes what a progress bar is told."""

    def __init__(self):
        self.calls = []

    def start(self, task, total=None):
        self.calls.append(("start", task, total))

    def advance(self, task, steps=1, note=""):
        self.calls.append(("advance", steps, note))

    def finish(self, task):
        self.calls.append(("finish", task))


def test_progress_hears_of_each_block(tiny):
    steps = Steps()
    run(tiny, gptq(rules=(Rule(pattern="model.layers.1.*", skip=True),)), progress=steps)
    assert steps.calls[0] == ("start", "blocks", 2)
    assert steps.calls[-1] == ("finish", "blocks")
    notes = [call[2] for call in steps.calls[1:-1]]
    assert [call[:2] for call in steps.calls[1:-1]] == [("advance", 1)] * 2
    assert notes[0].startswith("error ")
    assert notes[1] == "kept"


def test_forced_kernel_changes_no_code(tiny):
    names = ("reference", "float32")
    models = [run(tiny, gptq(), kernel=name) for name in names]
    assert all(
        {m.force for m in packed_of(model).values()} == {name} for model, name in zip(models, names, strict=True)
    )
    assert same(*(stored(model) for model in models))


def test_a_packed_model_is_not_quantized_again(tiny):
    model = run(tiny, W4A8_RTN)
    before = stored(model)
    with pytest.raises(
        InputError, match=r"is quantized already: model\.layers\.0\.\S+ and 13 others.*original model"
    ):
        quantize(model, W4A8_RTN, None)
    assert same(stored(model), before)


@pytest.mark.parametrize("recipe", [W4A8_RTN, gptq(), qqq(group_size=32, **FAST)], ids=["rtn", "gptq", "qqq"])
def test_weights_that_are_not_finite_name_the_linear(tiny, recipe):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(
        (InputError, CalibrationError), match=r"^model\.layers\.1\.mlp\.gate_proj and mlp\.up_proj: "
    ):
        quantize(model, recipe, TOKENS)


def test_embeddings_that_are_not_finite_name_the_first_linears(tiny):
    model = tiny("llama")
    model.model.embed_tokens.weight.data[int(TOKENS[3, 3])] = float("nan")
    with pytest.raises(CalibrationError, match=r"^model\.layers\.0\.self_attn\.q_proj .*hessian=.*not finite"):
        quantize(model, gptq(), TOKENS)


def test_half_precision_models_are_solved_in_float32(tiny):
    model = tiny_model("opt", dtype=torch.bfloat16)
    quantize(model, replace(gptq(), transforms=(AdaptiveSmoothing(num_candidates=3),)), TOKENS)
    for module in packed_of(model).values():
        assert module.bias.dtype == torch.bfloat16
        assert module.scale.dtype == torch.float32
    assert model(UNSEEN).logits.dtype == torch.bfloat16
