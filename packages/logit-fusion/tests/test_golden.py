"""The recorded numbers of tests/golden (or of ``--golden DIR``), every case, in float64 and float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusion_core.testing import array, fill_state_dict
from logit_fusion import fuse_logits
from logit_fusion.arguments import expert_weights
from logit_fusion.arrays import as_tensor
from logit_fusion.family import divergences, normalized, tilted
from logit_fusion.grid import make_grid
from logit_fusion.kernels import make_family, prepared
from logit_fusion.solve import evaluate_nodes
from logit_fusion.strategies import Search, aim_at, pool_targets
from logit_fusion.targets import targets

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


class Record:
    """One case: its settings, its recorded values, and the comparison at the tolerances of cases.json."""

    def __init__(self, golden, settings, values, dtype, factor=1.0):
        self.golden, self.settings, self.values, self.dtype, self.factor = (
            golden,
            settings,
            values,
            dtype,
            factor,
        )
        name = "tolerances" if dtype == torch.float64 else "tolerances_float32"
        self.limits = golden.settings[name]
        self.range = tuple(settings["alpha_range"])
        self.step = settings["step"]

    def __getitem__(self, key):
        return self.values[f"{self.settings['case']}/{key}"]

    def __contains__(self, key):
        return f"{self.settings['case']}/{key}" in self.values

    def assert_close(self, actual, key, kind):
        limit = self.limits[kind]
        wanted = self[key]
        got = actual.detach().double().cpu().numpy()
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(wanted), err_msg=key)
        finite = np.isfinite(wanted)
        self.golden.assert_close(
            np.where(finite, got, 0.0),
            np.where(finite, wanted, 0.0),
            rtol=limit["rtol"] * self.factor,
            atol=limit["atol"] * self.factor,
            what=f"{self.settings['case']}: {key}",
        )

    def fuse(self, members, **settings):
        large, base, *experts = members
        common = {"alpha_range": self.range, "step": self.step, "compute_dtype": self.dtype}
        return fuse_logits(large, base, experts, **{**common, **settings})


def records(golden, file, dtype):
    values = golden.load(file)
    for settings in golden.settings[file.removesuffix(".npz")]:
        loose = dtype == torch.float32 and settings.get("float32") == "rounded_inputs"
        yield Record(golden, settings, values, dtype, 10.0 if loose else 1.0)


def made(golden, settings, dtype, device):
    prefix, size = golden.settings["prefix"] + settings["tag"], (settings["V"],)
    large = array(f"{prefix}/large", size, settings["scale_large"])
    base = 0.5 * large + array(f"{prefix}/base", size, settings["scale_base"])
    experts = [
        base + array(f"{prefix}/expert{t}", size, settings["scale_expert"] * (1 + 0.5 * t))
        for t in range(settings.get("experts", 1))
    ]
    return [torch.tensor(x, dtype=dtype, device=device).unsqueeze(0) for x in (large, base, *experts)]


def loss_table(record, members, number=0):
    ready, _ = prepared(members, None, record.dtype, differentiable=False)
    family = make_family(ready.log_p, ready.p, ready.shifts[number])
    target = aim_at(ready.f, ready.r, ready, Search())
    return as_tensor(evaluate_nodes(family, target, make_grid(*record.range, record.step)).loss)[0]


def roots(record, members):
    for objective, key in (("forward", "alpha_F"), ("reverse", "alpha_R"), ("jeffreys", "alpha_J")):
        found = record.fuse(members, objective=objective)
        record.assert_close(found.alpha[0, 0], key, "root")


@both_dtypes
def test_single(golden, dtype, device):
    for record in records(golden, "single.npz", dtype):
        members = made(golden, record.settings, dtype, device)
        grid = record.fuse(members, strategy="single", solver="grid")
        exact = record.fuse(members, strategy="single", solver="exact")
        record.assert_close(exact.f[0, 0], "f", "value")
        record.assert_close(exact.r[0, 0], "r", "value")
        for f, key in zip(targets(members[1][0], members[2][0]), "fr", strict=True):
            record.assert_close(f, key, "value")
        record.assert_close(loss_table(record, members), "loss_table", "value")
        record.assert_close(grid.alpha[0, 0], "alpha_grid", "alpha_grid")
        record.assert_close(exact.alpha[0, 0], "alpha_exact", "alpha_exact")
        record.assert_close(exact.loss[0], "loss_exact", "value")
        record.assert_close(grid.log_probs[0, :64], "logp_grid", "log_probs")
        record.assert_close(exact.log_probs[0, :64], "logp_exact", "log_probs_exact")
        roots(record, members)
        at_alphas(record, members)


def at_alphas(record, members):
    log_p, log_q, log_e = (normalized(x[0]) for x in members)
    shift = log_e - log_q
    alphas = torch.tensor(record.settings["alphas_for_at"], dtype=record.dtype, device=log_p.device)
    stats = tilted(log_p.expand(len(alphas), -1), shift.expand(len(alphas), -1), alphas)
    forward, reverse = divergences(stats, alphas, (log_p.exp() * shift).sum())
    found = (("at_A", stats.log_norm), ("at_mu", stats.mean), ("at_var", stats.var))
    for key, value in (*found, ("at_F", forward), ("at_R", reverse)):
        record.assert_close(value, key, "value")


@both_dtypes
def test_multi(golden, dtype, device):
    for record in records(golden, "multi.npz", dtype):
        members = made(golden, record.settings, dtype, device)
        count = record.settings["experts"]
        single = record.fuse(members, strategy="single", solver="grid")
        record.assert_close(single.f[0], "f", "value")
        record.assert_close(single.r[0], "r", "value")
        tables = torch.stack([loss_table(record, members, t) for t in range(count)])
        record.assert_close(tables, "single_loss_table", "value")
        record.assert_close(single.alpha[0], "single_grid_alpha", "alpha_grid")
        best_two = np.sort(record["single_exact_all"][:, 1])[:2]
        if best_two[1] - best_two[0] > 1e-9:
            exact = record.fuse(members, strategy="single", solver="exact")
            record.assert_close(exact.alpha[0], "single_exact_alpha", "alpha_exact")
        if record.settings["joint_grid"]:
            joint(record, members)
        for weights in ("uniform", "jeffreys"):
            for strategy in ("pool", "centroid"):
                found = record.fuse(members, strategy=strategy, weights=weights)
                record.assert_close(found.alpha[0], f"{strategy}_{weights}_alpha", "alpha_exact")
                if strategy == "pool":
                    record.assert_close(found.log_probs[0, :64], f"pool_{weights}_logp64", "log_probs_exact")
        pools(record, members)


def joint(record, members):
    grid = record.fuse(members, strategy="joint", solver="grid")
    record.assert_close(grid.alpha[0], "joint_grid_alpha", "alpha_grid")
    record.assert_close(grid.loss[0], "joint_grid_loss", "value")
    exact = record.fuse(members, strategy="joint", solver="exact")
    limit = record.limits["value"]
    best = float(record["joint_grid_loss"])
    assert float(exact.loss[0]) <= best * (1 + limit["rtol"]) + limit["atol"]
    assert float(exact.loss[0]) >= float(record["joint_floor"]) * (1 - limit["rtol"]) - limit["atol"]


def pools(record, members):

    ready, _ = prepared(members, None, record.dtype, differentiable=False)
    for rule in ("uniform", "jeffreys"):
        weights = expert_weights(rule, ready.f, ready.r, torch.Size([1]))
        record.assert_close(weights[0], f"w_{rule}", "value")
        found = torch.stack(pool_targets(ready, weights), -1)[0]
        record.assert_close(found, f"pool_{rule}_fr", "value")


@both_dtypes
def test_edge(golden, dtype, device):
    for record in records(golden, "edge.npz", dtype):
        members = [
            torch.tensor(record[name], dtype=dtype, device=device).unsqueeze(0)
            for name in ("large", "base", "expert")
        ]
        grid = record.fuse(members, strategy="single", solver="grid")
        exact = record.fuse(members, strategy="single", solver="exact", certify=True)
        check = record.settings["check"]
        low, high = record.range
        assert low <= float(exact.alpha[0, 0]) <= high
        if dtype == torch.float32 and record.settings["float32"] == "own_alpha":
            own_alpha(record, members, exact)
            continue
        record.assert_close(
            exact.log_probs[0], "logp_exact", "log_probs" if check == "tiny" else "log_probs_exact"
        )
        if check == "log_probs":
            assert float(exact.alpha[0, 0]) == low
        if check != "all":
            continue
        record.assert_close(exact.f[0, 0], "f", "value")
        record.assert_close(exact.r[0, 0], "r", "value")
        record.assert_close(grid.alpha[0, 0], "alpha_grid", "alpha_grid")
        record.assert_close(exact.alpha[0, 0], "alpha_exact", "alpha_exact")
        record.assert_close(exact.loss[0], "loss_exact", "value")
        roots(record, members)
        if "local_minima" in record:
            assert_local_minima(record, members)


def own_alpha(record, members, exact):
    """Float32 cannot hold these inputs: the law must be right for the alpha that was found."""
    large, base, expert = (x[0].double() for x in members)
    wanted = (large + float(exact.alpha[0, 0]) * (expert - base)).log_softmax(-1)
    limit = record.limits["log_probs"]
    scale = float((large.abs() + 2 * (expert.abs() + base.abs())).max())
    error = (exact.log_probs[0].double() - wanted).abs().max()
    assert float(error) <= limit["atol"] + limit["rtol"] * scale


def assert_local_minima(record, members):
    """A fine grid of our own objective has its local minima where they were recorded."""
    low, high = record.range
    fine = Record(
        record.golden, {**record.settings, "step": (high - low) / 4000}, record.values, record.dtype
    )
    table = loss_table(fine, members).cpu().numpy()
    inner = np.flatnonzero((table[1:-1] < table[:-2]) & (table[1:-1] <= table[2:])) + 1
    places = low + inner * fine.step
    wanted = np.asarray(record["local_minima"])
    limit = record.limits["local_minima"]["atol"]
    for place in wanted:
        assert np.abs(places - place).min() <= limit
    assert len(places) == len(wanted) or record.dtype == torch.float32


@both_dtypes
def test_large_vocab(golden, dtype, device):
    for record in records(golden, "large_vocab.npz", dtype):
        settings = record.settings
        prefix, size = golden.settings["prefix"] + settings["tag"], (settings["V"],)
        single = np.float32
        large = array(f"{prefix}/L", size, settings["scale_large"]).astype(single)
        base = (0.5 * large + array(f"{prefix}/B", size, settings["scale_base"])).astype(single)
        expert = (base + array(f"{prefix}/E", size, settings["scale_expert"])).astype(single)
        members = [torch.tensor(x, dtype=dtype, device=device).unsqueeze(0) for x in (large, base, expert)]
        grid = record.fuse(members, strategy="single", solver="grid")
        exact = record.fuse(members, strategy="single", solver="exact")
        for key in record.values:
            case, _, name = key.partition("/")
            if case != settings["case"] or name in ("V", "shift_scale", "s"):
                continue
            value, kind = {
                "f": (exact.f[0, 0], "value"),
                "r": (exact.r[0, 0], "value"),
                "loss_table": (loss_table(record, members), "value"),
                "alpha_grid": (grid.alpha[0, 0], "alpha_grid"),
                "alpha_exact": (exact.alpha[0, 0], "alpha_exact"),
                "loss_exact": (exact.loss[0], "value"),
            }.get(name, (None, None))
            if value is not None:
                record.assert_close(value, name, kind)


def tiny_models(golden, dtype, device, attention):
    """Large, base and experts as the README of the records describes them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rules = golden.settings["generate"]

    def made(sizes, names=()):
        config = LlamaConfig(**rules["config"], **sizes, attn_implementation=attention)
        model = LlamaForCausalLM(config).to(torch.float64)
        fill_state_dict(model)
        state = model.state_dict()
        for name in names:
            for key, value in state.items():
                if value.ndim == 2:
                    scale = rules["expert_scale"] * value.shape[1] ** -0.5
                    value.add_(torch.from_numpy(array(f"{name}.{key}", value.shape, scale)))
        state["lm_head.weight"].mul_(rules["head_factor"])
        return model.to(dtype).to(device).eval()

    experts = [made(rules["small"], [f"expert{t}"]) for t in range(rules["experts"])]
    return [made(rules["large"]), made(rules["small"]), *experts]


def fused_model(models, rules):
    from logit_fusion import FusedModel

    experts = {f"expert{t}": models[2 + t] for t in rules["experts"]}
    options = {key: value for key, value in rules.items() if key != "experts"}
    return FusedModel(models[0], models[1], experts, **options)


def prompts(record):
    ends = np.cumsum(record["prompt_lengths"])
    return [torch.from_numpy(x) for x in np.split(record["prompts_flat"], ends[:-1])]


def compare_generated(golden, record, mode, tokens, alpha, log_probs, rules):
    limits = golden.settings["tolerances"]
    assert tokens.tolist() == record[f"{mode}/tokens"].tolist(), mode
    whole = np.zeros_like(record[f"{mode}/alpha"])
    whole[:, :, rules["experts"]] = alpha
    for found, key, kind in ((whole, "alpha", "generate_alpha"), (log_probs, "logp", "generate_log_probs")):
        golden.assert_close(found, record[f"{mode}/{key}"], what=f"{mode} {key}", **limits[kind])


def test_generate_without_a_cache_one_by_one(golden, device):
    record, rules = golden.load("generate.npz"), golden.settings["generate"]
    models = tiny_models(golden, torch.float64, device, "eager")
    given = prompts(record)
    with torch.no_grad():
        first = torch.stack([model(given[0][None].to(device)).logits[0, -1] for model in models])
        golden.assert_close(first, record["first_logits"], **golden.settings["tolerances"]["first_logits"])
        for mode, options in rules["modes"].items():
            fused = fused_model(models, options)
            found = [one_by_one(fused, x.to(device)[None], rules["max_new_tokens"]) for x in given]
            tokens, alpha, log_probs = (torch.stack(x) for x in zip(*found, strict=True))
            compare_generated(golden, record, mode, tokens, alpha.cpu().numpy(), log_probs, options)


def one_by_one(fused, ids, count):
    tokens, alphas, log_probs = [], [], []
    for _ in range(count):
        output = fused(ids, use_cache=False, logits_to_keep=1)
        value, token = output.logits[:, -1].max(-1)
        ids = torch.cat([ids, token[:, None]], 1)
        tokens.append(int(token))
        alphas.append(output.step.alpha[0, -1])
        log_probs.append(value[0])
    return torch.tensor(tokens), torch.stack(alphas), torch.stack(log_probs)


@both_dtypes
def test_generate_with_caches_in_one_padded_batch(golden, dtype, device):
    record, rules = golden.load("generate.npz"), golden.settings["generate"]
    models = tiny_models(golden, dtype, device, "sdpa")
    given = prompts(record)
    longest = max(len(x) for x in given)
    pad = rules["config"]["pad_token_id"]
    ids = torch.full((len(given), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(given):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    for mode, options in rules["modes"].items():
        output = fused_model(models, options).generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=rules["max_new_tokens"],
            do_sample=False,
            trace=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[:, longest:]
        laws = torch.stack(output.logits, 1)
        log_probs = laws.gather(-1, tokens[..., None]).squeeze(-1)
        trace = output.trace
        assert trace.sequence.tolist() == np.repeat(np.arange(len(given)), tokens.shape[1]).tolist()
        alpha = np.asarray(trace.alpha).reshape(*tokens.shape, -1)
        compare_generated(golden, record, mode, tokens, alpha, log_probs, options)
