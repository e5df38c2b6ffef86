"""fuse, align and their rules.

Both sides of every difference to the authors' code, several models, widths, depth, bad input.
"""

import numpy as np
import pytest
import torch
from torch import nn

from fusion_core.errors import FusionWarning
from ot_fusion import (
    FusionConfig,
    IllegalMapError,
    Moments,
    Plan,
    align,
    check_equivalence,
    diagnose,
    fuse,
    fuse_encoder_block,
    interpolate,
)
from ot_fusion.errors import DataError, InputError, ShapeError
from ot_fusion.groups import Heads
from ot_fusion.legal import check_legal
from ot_fusion.metrics import linear_cka
from ot_fusion.spec.vit import vit_names

EMD = FusionConfig(solver="emd")


def vit_key(state, key):
    """The name of a tensor in this version of transformers; ``key`` is that of 5.23."""
    return {next(iter(vit_names({name: None}))): name for name in state}[key]


def trio(models, name="vit"):
    return [models.make(name, seed=seed) for seed in range(3)]


def test_several_models_weigh_the_same_everywhere(models):
    a, b, c = trio(models)
    data = models.inputs("vit", 20)
    fused = fuse([a, b, c], data=data, config=EMD)
    parts = [fuse([m, c], data=data, config=EMD.replace(alpha=0.0)).state for m in (a, b)]
    for key, anchor in c.state_dict().items():
        torch.testing.assert_close(
            fused.state[key], (parts[0][key] + parts[1][key] + anchor) / 3, atol=1e-12, rtol=0
        )
    official = fuse([a, b, c], data=data, config=EMD.replace(alpha_rule="official"))
    # the authors weigh the anchor 1/2 in blocks, 1/3 elsewhere
    key = vit_key(official.state, "vit.layers.0.mlp.fc1.weight")
    torch.testing.assert_close(
        official.state[key], (parts[0][key] + parts[1][key]) / 4 + c.state_dict()[key] / 2
    )
    key = "classifier.weight"
    torch.testing.assert_close(official.state[key], (parts[0][key] + parts[1][key] + c.state_dict()[key]) / 3)
    given = fuse(
        {"a": a, "b": b, "c": c}, anchor="c", weights={"a": 0.7, "b": 0.1, "c": 0.2}, data=data, config=EMD
    )
    key = "vit.layernorm.weight"
    torch.testing.assert_close(
        given.state[key], 0.7 * parts[0][key] + 0.1 * parts[1][key] + 0.2 * c.state_dict()[key]
    )


def test_what_is_not_fused_comes_from_the_anchor(models):
    a, b, _ = trio(models)
    data = models.inputs("vit", 20)
    for pattern, kept in ((("*mlp*", "*intermediate*"), "layernorm_before"), (("*.weight",), "bias")):
        fused = fuse([a, b], data=data, config=EMD.replace(fuse_parts=pattern))
        for key, value in b.state_dict().items():
            if kept in key:
                assert torch.equal(fused.state[key], value)
        key = vit_key(fused.state, "vit.layers.0.mlp.fc1.weight")
        assert not torch.equal(fused.state[key], b.state_dict()[key])
    odd = EMD.replace(fuse_parts=("*mlp*", "*intermediate*", "classifier*"), unfused="official")
    state = fuse(
        [a, b], data=data, config=odd
    ).state  # the authors take it from the source, the first norm from the second
    source = a.state_dict()
    first, second, query = (
        vit_key(state, f"vit.layers.0.{name}.weight")
        for name in ("layernorm_before", "layernorm_after", "attention.q_proj")
    )
    assert torch.equal(state[first], source[second])
    assert torch.equal(state[query], source[query])


def test_an_unfused_classifier_closes_the_last_block_in_the_authors_code(models):
    a, b, _ = trio(models)
    parts = ("vit*",)
    ours = fuse([a, b], data=models.inputs("vit", 20), config=EMD.replace(fuse_parts=parts))
    official = fuse(
        [a, b],
        data=models.inputs("vit", 20),
        config=FusionConfig.official(solver="emd", fuse_parts=parts, unfused="ours"),
    )
    assert "blocks.1.fc2" in ours.maps
    assert "blocks.1.fc2" not in official.maps
    norm = "vit.layernorm.weight"
    expected = (a.state_dict()[norm] + b.state_dict()[norm]) / 2
    torch.testing.assert_close(official.state[norm], expected)


def test_weighted_policies_measure_raw_or_transformed_activations(models):
    a, b, _ = trio(models)
    data = models.inputs("vit", 30)
    for policy in ("weighted_scalar", "weighted_matrix"):
        raw = fuse([a, b], data=data, config=EMD.replace(residual=policy))
        official = fuse([a, b], data=data, config=EMD.replace(residual=policy, residual_weights="official"))
        mean = fuse([a, b], data=data, config=EMD)
        node = "blocks.0.middle"
        far = float((raw.maps[node].matrix - mean.maps[node].matrix).abs().sum())
        near = float((official.maps[node].matrix - mean.maps[node].matrix).abs().sum())
        assert near < far  # standardised activations all weigh about the same
    size = Moments()
    with torch.no_grad():
        entry = b.vit.embeddings(data)
    size.update(entry.flatten(0, 1), entry.flatten(0, 1))
    # row 3 in words: the skip of the first add is the block's input, standardised by itself
    state = fuse(
        [a, b], data=data, config=EMD.replace(residual="weighted_scalar", residual_weights="official")
    )
    assert state.maps["blocks.0.middle"].matrix.shape == (16, 16)


def test_joint_maps_in_both_orders(models):
    a, b, _ = trio(models)
    data = models.inputs("vit", 30)
    ours = fuse([a, b], data=data, config=EMD.replace(qk="joint"))
    swapped = fuse([a, b], data=data, config=EMD.replace(qk="joint", joint_order="official"))
    plan, other = ours.maps["blocks.0.context.qk"].matrix, swapped.maps["blocks.0.context.qk"].matrix
    assert torch.equal(plan.roll((16, 16), (0, 1)), other)
    assert not torch.equal(plan, other)


def test_class_token_on_the_stream_or_with_its_own_map(models):
    a, b, _ = trio(models)
    data = models.inputs("vit", 20)
    ours, own = (
        fuse([a, b], data=data, config=EMD.replace(class_token=rule)) for rule in ("stream", "own_map")
    )
    assert "class_token" not in ours.maps
    assert own.maps["class_token"].matrix.shape == (16, 16)
    t = ours.maps["embedded"].out_map()
    token = a.state_dict()["vit.embeddings.cls_token"] @ t
    torch.testing.assert_close(
        ours.state["vit.embeddings.cls_token"], (token + b.state_dict()["vit.embeddings.cls_token"]) / 2
    )


def test_an_identity_skip_is_an_identity(models):
    params = {}
    for name in ("layernorm_before", "layernorm_after"):
        params |= {f"{name}.weight": torch.ones(4), f"{name}.bias": torch.zeros(4)}
    for name in (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ):
        params |= {f"{name}.weight": torch.randn(4, 4), f"{name}.bias": torch.randn(4)}
    config = FusionConfig(features="wts", solver="sinkhorn", reg=1.0)
    _, ours, _ = fuse_encoder_block(params, params, None, None, None, config)
    _, official, maps = fuse_encoder_block(
        params, params, None, None, None, config.replace(identity_skip="official")
    )
    assert torch.equal(official, (maps["attention.output.dense"] + maps["output.dense"]) / 2)
    assert not torch.equal(ours, official)


def test_post_norm_moves_with_the_merged_map(models):
    a, b, _ = trio(models, "bert")
    data = models.inputs("bert", 20)
    ours = fuse([a, b], data=data, config=EMD)
    official = fuse([a, b], data=data, config=EMD.replace(post_norm="official"))
    key = "bert.encoder.layer.0.output.LayerNorm.weight"
    wanted = a.state_dict()[key] @ ours.maps["blocks.0.sum"].out_map()
    torch.testing.assert_close(ours.state[key], (wanted + b.state_dict()[key]) / 2)
    wanted = a.state_dict()[key] @ official.maps["blocks.0.fc2"].out_map()
    torch.testing.assert_close(official.state[key], (wanted + b.state_dict()[key]) / 2)


def test_shortcuts_merge_or_follow_the_predecessor(models):
    a, b = (models.make("resnet", seed=seed) for seed in range(2))
    data = models.inputs("resnet", 10)
    ours = fuse([a, b], data=data, config=EMD)
    plans = ours.maps
    node = "layer2.0.sum"
    torch.testing.assert_close(
        plans[node].matrix, (plans["layer2.0.shortcut"].matrix + plans["layer2.0.conv2"].matrix) / 2
    )
    old = fuse([a, b], data=data, config=FusionConfig.otfusion(features="acts"))
    # a 3 x 3 convolution follows the first shortcut, so the two are averaged; identity skips are ignored
    torch.testing.assert_close(
        old.maps[node].matrix, (old.maps["layer2.0.shortcut"].matrix + old.maps["layer2.0.conv2"].matrix) / 2
    )
    assert torch.equal(old.maps["layer2.1.sum"].matrix, old.maps["layer2.1.conv2"].matrix)


def test_crashes_of_the_published_code_do_not_happen(models):
    a, b, _ = trio(models)
    data = models.inputs("vit", 20)
    for settings in (
        {"normalize": "median"},
        {"normalize": "log1p"},
        {"metric": "cosine"},
        {"metric": "angular"},
        {"clip": (0.0, 5.0)},
        {"fuse_parts": ("*.weight",)},
    ):
        fused = fuse([a, b], data=data, config=FusionConfig.official(solver="emd", **settings))
        assert all(bool(torch.isfinite(value).all()) for value in fused.state.values())
    still = models.make("vit")
    still.vit.embeddings.cls_token.data.zero_()  # constant features: cost 0, once 0/0
    twin = models.make("vit", seed=1)
    twin.vit.embeddings.cls_token.data.zero_()
    fused = fuse([still, twin], data=data, config=FusionConfig.official(solver="emd"))
    torch.testing.assert_close(fused.maps["class_token"].matrix, Plan.identity(16).matrix)
    wide = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 5)).double()
    thin = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)).double()
    fuse(
        [wide, thin],
        data=torch.randn(30, 8, dtype=torch.float64),
        config=FusionConfig.otfusion(features="acts"),
    )


def test_unequal_widths(models):
    wide, thin = (
        models.make("llama", hidden_size=24, intermediate_size=40, num_attention_heads=6),
        models.make("llama", seed=1),
    )
    data = models.inputs("llama", 20)
    for rule in ("paper", "exact"):
        for strategy in ("flow", "consistent"):
            fused = fuse([wide, thin], data=data, config=FusionConfig(normalization=rule, strategy=strategy))
            assert fused.model.config.hidden_size == 16
            assert bool(torch.isfinite(fused.model(**data).logits).all())
    assert fuse([thin, wide], data=data).state["model.norm.weight"].shape == (24,)
    more = models.make("llama-mha", num_attention_heads=8, hidden_size=32)
    fewer = models.make("llama-mha", seed=1)
    assert fuse([more, fewer], data=data).state["model.norm.weight"].shape == (16,)


def test_unequal_depth_takes_a_map_of_layers(models):
    deep, flat = models.make("vit", num_hidden_layers=3), models.make("vit", seed=1)
    data = models.inputs("vit", 20)
    with pytest.raises(ShapeError, match="3 blocks and the anchor 2; give layer_map"):
        fuse([deep, flat], data=data)
    for strategy in ("flow", "consistent"):
        config = FusionConfig(strategy=strategy, solver="emd")
        fused = fuse([deep, flat], data=data, layer_map={0: 0, 1: 2}, config=config)
        assert {name.split(".")[1] for name in fused.maps if name.startswith("blocks.")} == {"0", "1"}
        grown = fuse([flat, deep], data=data, layer_map={0: 0, 2: 1}, config=config)
        key = vit_key(grown.state, "vit.layers.1.mlp.fc1.weight")
        assert torch.equal(grown.state[key], deep.state_dict()[key])  # an unmatched block stays the anchor's
        key = vit_key(grown.state, "vit.layers.2.mlp.fc1.weight")
        assert not torch.equal(grown.state[key], deep.state_dict()[key])
    with pytest.raises(InputError, match="source blocks that rise"):
        fuse([deep, flat], data=data, layer_map={0: 2, 1: 1})
    with pytest.raises(InputError, match="the anchor has 2 blocks and the source 3"):
        fuse([deep, flat], data=data, layer_map={0: 0, 1: 9})


def test_legal_maps_of_heads(models):
    a, b, _ = trio(models, "llama")
    data = models.inputs("llama", 20)
    enforced = fuse([a, b], data=data)
    assert enforced.config.legal == "enforce"  # the default for decoders
    tiles = enforced.maps["blocks.0.k"].matrix.view(2, 4, 2, 4)
    off = tiles - torch.diag_embed(tiles.permute(0, 2, 1, 3).diagonal(dim1=2, dim2=3)).permute(0, 2, 1, 3)
    assert float(off.abs().max()) == 0  # rotary channels keep their places
    with pytest.warns(FusionWarning, match="mixes attention heads"):
        fuse([a, b], data=data, config=FusionConfig(legal="warn"))
    free = fuse([a, b], data=data, config=FusionConfig(legal="off"))
    group = Heads(2, 2, 4, qk="rotary")
    with pytest.raises(IllegalMapError, match=r"blocks.0.k .*legal='off'"):
        check_legal("blocks.0.k", free.maps["blocks.0.k"], group, group, "k")
    check_legal("blocks.0.k", enforced.maps["blocks.0.k"], group, group, "k")


def test_overrides_by_name(models):
    a, b, _ = trio(models)
    config = FusionConfig(overrides={"blocks.0.*": {"solver": "emd"}, "*.fc1": {"reg": 0.5}})
    fused = fuse([a, b], data=models.inputs("vit", 20), config=config)
    assert fused.costs["blocks.0.q"]["solver"] == "lsa"
    assert fused.costs["blocks.1.q"]["solver"] == "sinkhorn"
    assert config.at("blocks.1.fc1").reg == 0.5
    with pytest.raises(InputError, match="solver is 'emb'"):
        FusionConfig(overrides={"*": {"solver": "emb"}})
    with pytest.raises(InputError, match=r"overrides.*color"):
        FusionConfig(overrides={"*": {"color": 1}})


def test_models_come_back_untouched(models):
    a, b, _ = trio(models)
    a.train()
    a.classifier.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in a.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    fuse([a, b], data=models.inputs("vit", 20))
    assert a.training
    assert not b.training
    assert not a.classifier.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in a.state_dict().items())
    assert not any(module._forward_hooks for module in a.modules())
    with pytest.raises(DataError):
        fuse([a, b], data=torch.full((4, 1, 8, 8), float("nan")))
    assert a.training
    assert not any(module._forward_hooks for module in a.modules())


def test_equivalence_barrier_and_similarity(models):
    a, b = models.make("mlp"), models.make("mlp", seed=1)
    x = models.inputs("mlp", 50)
    assert check_equivalence(a, a, x).to_dict() == {"max_abs": 0.0, "max_rel": 0.0}
    assert check_equivalence(a, b, x).max_rel > 0.1
    hard = align(a, to=b)
    assert check_equivalence(a, hard.model, x).max_abs < 1e-12
    curve = interpolate(hard.model, b, steps=5).evaluate(lambda m: float(m(x).square().mean()))
    assert curve.values.shape == (5,)
    np.testing.assert_allclose(curve.values[-1], float(b(x).square().mean()))
    line = np.linspace(curve.values[0], curve.values[-1], 5)
    assert curve.barrier == pytest.approx((curve.values - line).max())
    z = torch.randn(30, 5)
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    assert linear_cka(z, z @ turn) == pytest.approx(1, abs=1e-6)
    assert linear_cka(z, torch.randn(30, 5)) < 0.6
    with pytest.raises(InputError, match="call evaluate"):
        interpolate(a, b).barrier  # noqa: B018
    with pytest.raises(ShapeError, match="align one to the other"):
        interpolate(a, models.make("convnet"))


def test_diagnose_tells_fine_tunes_from_strangers(models):
    a, b = models.make("vit"), models.make("vit", seed=1)
    near = models.make("vit")
    for p in near.parameters():
        p.data += 0.01 * torch.randn_like(p)
    data = models.inputs("vit", 40)
    for given in (None, data):
        assert diagnose(a, near, data=given).verdict == "average"
        assert diagnose(a, b, data=given).verdict == "transport"
    found = diagnose(a, near)
    assert found.identity_share > 0.95
    assert found.distance < 0.1
    assert "Do not transport" in found.to_dict()["sentence"]


def test_state_dicts_are_fused_by_their_weights(models):
    from ot_fusion.spec import spec_for

    a, b = models.make("mlp"), models.make("mlp", seed=1)
    config = FusionConfig(features="wts")
    whole = fuse([a, b], config=config)
    found = fuse([a.state_dict(), b.state_dict()], spec=spec_for(a), config=config)
    assert found.model is None
    assert all(torch.equal(found.state[key], value) for key, value in whole.state.items())


def test_presets_name_whole_configurations():
    assert FusionConfig.official().official_side("alpha_rule")
    assert FusionConfig(faithful="official").map_rule == "official"
    assert not FusionConfig.official(shortcut="ours").official_side("shortcut")
    assert FusionConfig.paper_vit().tokens == "window:6"
    assert FusionConfig.paper_bert().tokens == "all"
    assert FusionConfig.git_rebasin().strategy == "consistent"
    assert FusionConfig.otfusion().normalize == "none"
    found = FusionConfig.otfusion(alpha=0.3, overrides={"a": {"reg": 0.1}})
    assert FusionConfig.from_dict(found.to_dict()) == found
