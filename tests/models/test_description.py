# SPDX-License-Identifier: Apache-2.0
import pytest

from quattuor.errors import InputError
from quattuor.models import DESCRIPTIONS, Heads, Mlp, SiteKind
from quattuor.models.llama import LLAMA
from quattuor.models.opt import OPT
from quattuor.models.phi import PHI3


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(4, 3, 16), (2, 4, 16), (4, 0, 16), (0, 1, 16), (4, 4, 0)]
)
def test_heads_must_share_evenly(num_heads, num_kv_heads, head_dim):
    with pytest.raises(InputError, match=r"Heads: num_heads.*multiple.*config\.json"):
        Heads(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_attention_heads": 8, "hidden_size": 64}, (8, 8, 8)),
        ({"num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": None, "head_dim": None}, (8, 8, 8)),
        ({"num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": 2, "head_dim": 32}, (8, 2, 32)),
    ],
)
def test_heads_prefer_explicit_values(config, expected):
    heads = LLAMA.heads(config)
    assert (heads.num_heads, heads.num_kv_heads, heads.head_dim) == expected


def test_rows_of_fused_linears_follow_each_other():
    heads = Heads(num_heads=6, num_kv_heads=2, head_dim=8)
    rows = [PHI3.attention.rows(part, heads) for part in ("query", "key", "value")]
    assert rows == [slice(0, 48), slice(48, 64), slice(64, 80)]
    assert [PHI3.mlp.rows(part, 10) for part in ("gate", "up")] == [slice(0, 10), slice(10, 20)]


def test_rows_of_separate_linears_are_all_of_them():
    heads = Heads(num_heads=6, num_kv_heads=2, head_dim=8)
    rows = [LLAMA.attention.rows(part, heads) for part in ("query", "key", "value")]
    assert rows == [slice(0, 48), slice(0, 16), slice(0, 16)]
    assert [LLAMA.mlp.rows(part, 10) for part in ("gate", "up")] == [slice(0, 10), slice(0, 10)]


def test_a_network_without_gate_has_no_gate_rows():
    mlp = Mlp(module=None, gate=None, up="fc1", down="fc2")
    assert mlp.rows("up", 10) == slice(0, 10)
    with pytest.raises(InputError, match=r'Mlp\.rows: part=gate does not exist.*fc1 and fc2.*ask for "up"'):
        mlp.rows("gate", 10)


@pytest.mark.parametrize(
    ("activation", "kind", "producer"), [("relu", SiteKind.RELU, "fc1"), ("gelu", SiteKind.OPAQUE, None)]
)
def test_a_plain_network_folds_through_relu_only(activation, kind, producer):
    down = OPT.sites(activation)[-1]
    assert (down.kind, down.producer, down.consumers) == (kind, producer, ("fc2",))


def test_activation_that_the_configuration_lacks_is_not_taken_for_relu():
    assert OPT.activation({"activation_function": "relu"}) == "relu"
    assert OPT.sites(OPT.activation({}))[-1].kind is SiteKind.OPAQUE


@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_root_mean_square_without_post_norms_allows_rotation(model_type):
    assert DESCRIPTIONS[model_type].reason_against_residual_rotation() is None


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_post_norms_forbid_rotation(model_type, keeps_mean):
    reason = DESCRIPTIONS[model_type].reason_against_residual_rotation(keeps_mean=keeps_mean)
    assert "post_feedforward_layernorm" in reason


def test_layer_norm_allows_only_rotations_that_keep_the_mean():
    assert "mean" in OPT.reason_against_residual_rotation()
    assert OPT.reason_against_residual_rotation(keeps_mean=True) is None
