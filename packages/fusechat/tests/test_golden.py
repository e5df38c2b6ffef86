"""The recorded numbers of tests/golden (or of ``--golden DIR``), every case, in float64 and float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusechat import FusionBatch, FusionLoss, Targets, merge
from fusechat.align.counting import PairCounts
from fusechat.align.dynamic import warp
from fusechat.align.mapping import exact_table, nearest_table, statistics_table
from fusechat.align.pairs import dtw, token_costs
from fusechat.align.projecting import Published, project, published_onehot, published_rows
from fusechat.align.vocabulary import Vocabulary
from fusechat.losses import log_probs_at
from fusechat.merge import Merge, formulas
from fusechat.selecting import avg_ce_weights, min_ce, stack_ce
from fusion_core.testing import array, fill_state_dict

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
LOOSE = {"value": 1e-5, "loss": 1e-5, "model": 1e-5, "bf16": 1e-2, "slerp": 1e-5}


def assert_close(golden, actual, record, kind, dtype=torch.float64, what=""):
    """|x - recorded| <= atol + rtol * max|recorded|, as cases.json says; looser in float32."""
    limits = golden.settings["tolerances"][kind]
    largest = float(np.abs(record).max()) if np.size(record) else 0.0
    bound = limits["atol"] + limits["rtol"] * largest
    if dtype == torch.float32:
        bound = max(bound, LOOSE[kind] * max(largest, 1.0))
    golden.assert_close(actual, record, rtol=0, atol=bound, what=what)


def vocabularies(golden):
    record = golden.load("vocab_mapping.json")
    sides = []
    for side in ("source", "pivot"):
        special = record[f"{side}_special"]
        sides.append(
            Vocabulary(
                record[f"{side}_vocab"], record[f"{side}_mark"], **special, decoded=record[f"{side}_decoded"]
            )
        )
    return record, *sides


@pytest.mark.parametrize("compiled", [True, False], ids=["numba", "numpy"])
def test_dtw(golden, compiled):
    if compiled:
        pytest.importorskip("numba")
    for case in golden.load("dp_alignment.json"):
        if case["kind"] == "matrix":
            cost = np.abs(array(case["name"], case["shape"], case["scale"]))
            cost = np.floor(cost) if case["floor"] else cost
        else:
            cost = token_costs(
                case["source_tokens"], case["pivot_tokens"], source_mark="\u0120", pivot_mark="\u2581"
            )
            assert cost.tolist() == case["cost_matrix"]
        for tie in golden.settings["dp_alignment"]["ties"]:
            record = case[tie]
            path, total = warp(cost, tie, compiled=compiled)
            assert path.tolist() == record["path"]
            assert_close(golden, total, record["cost"], "value")
            rows = [[int(j) for i, j in path if i == row] for row in range(cost.shape[0])]
            columns = [[int(i) for i, j in path if j == column] for column in range(cost.shape[1])]
            assert (rows, columns) == (record["series1_to_2"], record["series2_to_1"])


def test_statistics_and_maps(golden):
    record, source, pivot = vocabularies(golden)
    counts = {name: PairCounts(len(pivot), len(source)) for name in ("distinct", "all")}
    for number, (a, b) in enumerate(zip(record["pivot_ids"], record["source_ids"], strict=True)):
        pairs = dtw([source.decoded[i] for i in b], [pivot.decoded[i] for i in a], tie="fusechat")
        assert pairs.pivot_to_source == record["sequence_pivot_to_source"][number]
        for name, table in counts.items():
            table.add_pairs(pairs, a, b, name)
    assert np.stack(counts["distinct"].nonzero(), 1).tolist() == record["statistics_nonzero"]
    assert np.stack(counts["all"].nonzero(), 1).tolist() == record["statistics_multiplicity_nonzero"]
    distinct = counts["distinct"]
    assert (
        statistics_table(distinct, source, pivot, "official").tolist()
        == record["source_to_pivot_ms_official"]
    )
    assert (
        statistics_table(distinct, source, pivot, "frequency").tolist()
        == record["source_to_pivot_ms_frequency"]
    )
    nearest = nearest_table(source, pivot)
    words = dict(zip(source.written(pivot.mark), (pivot.tokens[n] for n in nearest), strict=True))
    assert words == record["source_to_pivot_mined"]


@both_dtypes
def test_distribution_alignment(golden, dtype):
    record, source, pivot = vocabularies(golden)
    counts = PairCounts(len(pivot), len(source))
    keys = np.array(record["statistics_nonzero"]).astype(np.int64)
    counts.add(np.repeat(keys[:, 0], keys[:, 2]), np.repeat(keys[:, 1], keys[:, 2]))
    tables = {
        "exact": exact_table(source, pivot),
        "ms_official": statistics_table(counts, source, pivot, "official"),
        "mined": nearest_table(source, pivot),
    }
    for case in golden.load("distribution_alignment.json"):
        a, b = (np.array(record[f"{side}_ids"][case["sequence"]]) for side in ("pivot", "source"))
        scores = array(case["name"], case["shape"], case["scale"])
        order = np.argsort(-scores, axis=1, kind="stable")[:, : case["k"]]
        values = np.take_along_axis(scores, order, 1).astype(str(dtype).removeprefix("torch."))
        for name, rules in golden.settings["distribution_alignment"]["settings"].items():
            if rules["strings"] == "decoded":
                ours, theirs = [pivot.decoded[i] for i in a], [source.decoded[i] for i in b]
                pairs = dtw(theirs, ours, tie=rules["tie"])
            else:
                raw, ours = [source.tokens[i] for i in b], [pivot.tokens[i] for i in a]
                pairs = dtw(raw, ours, tie=rules["tie"], source_mark=source.mark, pivot_mark=pivot.mark)
                words = source.written(pivot.mark)
                theirs = [words[i] for i in b]
            table = tables[rules["map"][0]]
            for other in rules["map"][1:]:
                table = np.where(table < 0, tables[other], table)
            follow = Published(rules["usable"], rules["several"], rules["onehot"])
            rows = published_rows(pairs, ours, theirs, table, b, a, follow)
            fallback = published_onehot(a, rules["onehot"])
            made = project(values[rows.clip(0)], order[rows.clip(0)], table, collide="first")
            for place, row in enumerate(rows):
                kept = made.ids[place] >= 0
                ids = made.ids[place][kept].tolist() if row >= 0 else [int(fallback[place])]
                logits = made.logits[place][kept] if row >= 0 else np.array([1.0])
                assert ids == case[name]["indices"][place], (name, place)
                assert_close(
                    golden, logits, np.array(case[name]["logits"][place]), "value", dtype, f"{name} {place}"
                )


def ragged(cases, prefix, length, dtype):
    """Entries of the recorded lists, padded to the batch's length and the longest list."""
    lists = [(case[f"{prefix}per_step_indices"], case[f"{prefix}per_step_logits"]) for case in cases]
    k = max(len(row) for ids, _ in lists for row in ids)
    ids = torch.full((len(lists), length, k), -1)
    logits = torch.full((len(lists), length, k), -torch.inf, dtype=dtype)
    for n, (own, values) in enumerate(lists):
        for place, (row, row_values) in enumerate(zip(own, values, strict=True)):
            ids[n, place, : len(row)] = torch.tensor(row, dtype=torch.int64)
            logits[n, place, : len(row)] = torch.tensor(row_values, dtype=dtype)
        ids[n, len(own) :, 0], logits[n, len(own) :, 0] = 0, 1.0  # padding rows are one-hot at id 0
    mask = torch.ones(ids.shape[:2], dtype=torch.bool)
    return Targets(ids, logits, mask, torch.zeros(len(lists)))


def dense(targets, size, temperature):
    probs, _ = targets.probabilities(temperature)
    full = torch.zeros(*probs.shape[:2], size, dtype=probs.dtype)
    return full.scatter_add(-1, targets.ids.clamp(min=0), probs)


@both_dtypes
def test_target_distributions(golden, dtype):
    cases = golden.load("target_distributions_inputs.json")
    record, settings = golden.load("target_distributions.npz"), golden.settings["target_distributions"]
    length = record["labels"].shape[1]
    pivot = ragged(cases, "", length, dtype)
    source = ragged(cases, "fused_", length, dtype).filled(pivot)
    for temperature in settings["temperatures"]:
        for name, targets in (("pivot", pivot), ("source", source)):
            full = dense(targets, settings["vocab_size"], temperature)
            key = f"{name}_T{temperature}"
            assert_close(golden, full, record[f"ref64_{key}"], "value", dtype, key)
            inside = np.arange(length) < record["lengths"][:, None]
            assert_close(golden, full[inside], record[f"official_bf16_{key}"][inside], "bf16", dtype, key)


def loss_inputs(golden, dtype):
    record, targets = golden.load("fusion_loss.npz"), golden.load("target_distributions.npz")
    settings = golden.settings["fusion_loss"]
    shape = (*record["labels"].shape, golden.settings["target_distributions"]["vocab_size"])
    third = np.abs(array(settings["third"]["name"], shape)) ** settings["third"]["power"]
    third /= third.sum(-1, keepdims=True)
    made = {
        name: Targets.from_dense(
            torch.from_numpy(probs).to(dtype), torch.from_numpy(record[f"metric_{name}"])
        )
        for name, probs in (
            ("pivot", targets["ref64_pivot_T1"]),
            ("source", targets["ref64_source_T1"]),
            ("third", third),
        )
    }
    student = torch.from_numpy(array(settings["student"]["name"], shape, settings["student"]["scale"])).to(
        dtype
    )
    inputs = {"attention_mask": torch.from_numpy(record["attention_mask"])}
    return record, settings, made, student.requires_grad_(), inputs


@both_dtypes
@pytest.mark.parametrize("divergence", ["ce", "kl"])
def test_fusion_loss(golden, dtype, divergence):
    record, settings, made, student, inputs = loss_inputs(golden, dtype)
    labels = torch.from_numpy(record["labels"])
    one = FusionBatch(inputs, labels, (made["source"],), made["pivot"])
    many = FusionBatch(inputs, labels, (made["source"], made["third"]), made["pivot"])
    llm = {"mask": "attention"}
    runs = {
        f"fusechat_{divergence}_pairwise": (one, {}),
        f"fusechat_{divergence}_sourceonly": (one, {"select": "source"}),
        f"fusellm_{divergence}_mince_hard": (many, llm),
        f"fusellm_{divergence}_avgce_hard": (many, {**llm, "select": "avg_ce"}),
        f"fusellm_{divergence}_mince_hard_and_decay": (many, {**llm, "schedule": "decay"}),
        f"fusellm_{divergence}_avgce_hard_and_decay": (
            many,
            {**llm, "select": "avg_ce", "schedule": "decay"},
        ),
    }
    for name, (batch, options) in runs.items():
        loss = FusionLoss(1 - settings["lambda"], divergence, rewards=settings["rewards"], **options)
        found = loss(student, batch, **settings["decay"])
        assert_close(golden, found.total, record[f"{name}_loss"], "loss", dtype, name)
        assert_close(golden, found.sft, record["sft_loss"], "loss", dtype, name)
        if f"{name}_grad" in record:
            (grad,) = torch.autograd.grad(found.total, student)
            assert_close(golden, grad, record[f"{name}_grad"], "loss", dtype, name)


def test_choices_and_weights(golden):
    record = golden.load("fusion_loss.npz")
    ce = {name: torch.from_numpy(record[f"metric_{name}"]) for name in ("pivot", "source", "third")}
    sets = {"pairwise": [ce["pivot"], ce["source"]], "three": list(ce.values())}
    for name, values in sets.items():
        assert (
            min_ce(stack_ce(values), "bf16").tolist() == record[f"mince_choice_{name}_official_bf16"].tolist()
        )
        assert min_ce(stack_ce(values)).tolist() == record[f"mince_choice_{name}_fp64"].tolist()
    weights = avg_ce_weights(stack_ce(sets["three"]), "bf16")
    golden.assert_close(weights.T, record["avgce_weights_official_bf16"], rtol=0, atol=0)
    assert_close(golden, avg_ce_weights(stack_ce(sets["three"])).T, record["avgce_weights_fp64"], "value")


@both_dtypes
def test_end_to_end(golden, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    record, targets = golden.load("end_to_end.npz"), golden.load("target_distributions.npz")
    settings = golden.settings["end_to_end"]
    model = LlamaForCausalLM(LlamaConfig(**settings["config"], attn_implementation="eager")).double()
    fill_state_dict(model)
    model.to(dtype).train()
    made = [
        Targets.from_dense(
            torch.from_numpy(targets[f"ref64_{n}_T1"]).to(dtype), torch.from_numpy(targets[f"metric_{n}"])
        )
        for n in ("source", "pivot")
    ]  # fmt: skip
    inputs = {name: torch.from_numpy(targets[name]) for name in ("input_ids", "attention_mask")}
    batch = FusionBatch(inputs, torch.from_numpy(targets["labels"]), (made[0],), made[1])
    loss = FusionLoss(1 - settings["lambda"], rewards=settings["rewards"], sft_dtype=settings["sft_dtype"])
    logits = model(**inputs).logits
    assert_close(golden, logits, record["logits"], "model", dtype, "logits")
    k = record["top5_indices"].shape[-1]
    top = logits.topk(k, -1)
    assert_close(golden, top.values, record["top5_logits"], "model", dtype, "top5")
    assert (top.indices.numpy() == record["top5_indices"]).all()
    following = batch.labels[:, 1:]
    picked, _ = log_probs_at(logits[:, :-1], following.clamp(min=0)[..., None])
    learned = following >= 0
    ce = -(picked[..., 0] * learned).sum(1) / learned.sum(1)
    assert_close(golden, ce, record["metric_ce"], "model", dtype, "metric_ce")
    found = loss(logits, batch).total
    assert_close(golden, found, record["loss_before"], "model", dtype, "loss_before")
    found.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    norms = torch.stack([grads[name].norm() for name in sorted(grads)])
    assert_close(golden, norms, record["grad_norms"], "model", dtype, "grad_norms")
    assert_close(golden, grads["lm_head.weight"], record["grad_lm_head"], "model", dtype, "grad_lm_head")
    with torch.no_grad():
        for p in model.parameters():
            p -= settings["learning_rate"] * p.grad
    assert_close(
        golden, loss(model(**inputs).logits, batch).total, record["loss_after"], "model", dtype, "loss_after"
    )


def family(golden, dtype):
    settings = golden.settings["merging"]
    prefix = golden.settings["prefix"]
    base = {
        k: torch.as_tensor(array(f"{prefix}merge/pivot/{k}", tuple(s)), dtype=dtype)
        for k, s in settings["shapes"].items()
    }
    targets = []
    for j, scale in enumerate(settings["scales"]):
        step = {
            k: array(f"{prefix}merge/delta{j}/{k}", tuple(s), scale) for k, s in settings["shapes"].items()
        }
        still = {k for k, which in settings["equal_to_pivot"].items() if j in which}
        targets.append(
            {
                k: v.clone() if k in still else v + torch.as_tensor(step[k], dtype=dtype)
                for k, v in base.items()
            }
        )
    return base, targets


@both_dtypes
def test_merging(golden, dtype):
    record, settings = golden.load("merging.npz"), golden.settings["merging"]
    base, targets = family(golden, dtype)
    weights = record["weights"].tolist()
    seen = {"weights"}

    def assert_same(merged, label, kind="value"):
        found = merged.state_dict() if isinstance(merged, Merge) else merged
        for key, value in found.items():
            name = f"{label}/{key}"
            if name not in record:
                continue
            seen.add(name)
            expected = record[name]
            if expected.ndim > value.ndim:  # mergekit returns one copy of the pivot's tensor per target
                for copy in expected:
                    assert_close(golden, value, copy, kind, dtype, name)
                continue
            assert_close(golden, value, expected, kind, dtype, name)

    def told(merged, label):
        for row in merged.weights().flat_rows():
            name = f"{label}/{row['tensor']}"
            if name in record:
                seen.add(name)
                assert_close(
                    golden,
                    np.array([row[f"target {j}"] for j in range(len(targets))]),
                    record[name],
                    "value",
                    dtype,
                    name,
                )

    for tau in settings["taus"]:
        share = float(tau)
        assert_same(merge.sce(targets, base=base, tau=share, variant="fusechat"), f"sce_fusechat_{tau}")
        assert_same(merge.sce(targets, base=base, tau=share, variant="mergekit"), f"sce_mergekit_{tau}")
        assert_same(merge.sce(targets, base=base, tau=share), f"sce_paper_norm_{tau}")
        assert_same(merge.sce(targets, base=base, tau=share, normalize=False), f"sce_paper_sum_{tau}")
        told(merge.sce(targets, base=base, tau=share, variant="fusechat"), f"sce_weights_fusechat_{tau}")
        told(merge.sce(targets, base=base, tau=share), f"sce_weights_paper_{tau}")
    small = settings["small_delta"]
    key = small["tensor"]
    near = [{key: base[key] + small["factor"] * (t[key] - base[key])} for t in targets]
    for variant in ("fusechat", "mergekit"):
        row = (
            merge.sce(near, base={key: base[key]}, tau=small["tau"], variant=variant).weights().flat_rows()[0]
        )
        name = f"sce_small_delta_weights_{variant}"
        seen.add(name)
        found = np.array([row[f"target {j}"] for j in range(len(targets))])
        bound = (
            1e-3 if dtype == torch.float32 else None
        )  # differences of float32 numbers that are nearly equal
        if bound is None:
            assert_close(golden, found, record[name], "value", dtype, name)
        else:
            golden.assert_close(found, record[name], rtol=0, atol=bound, what=name)
    for level in ("matrix", "module", "layer", "model"):
        told(merge.varm(targets, base=base, level=level), f"varm_{level}_weights")
        assert_same(merge.varm(targets, base=base, level=level), f"varm_{level}")
    assert_same(merge.varm(targets, base=base, level="element"), "varm_element")
    told(merge.varm(targets, base=base, softmax=True), "varm_softmax_matrix_weights")
    assert_same(merge.linear(targets, weights=weights), "linear_normalized")
    assert_same(merge.task_arithmetic(targets, base=base, weights=weights), "task_arithmetic")
    lam = settings["task_lambda"]
    label = f"task_arithmetic_normalized_lambda{lam}"
    assert_same(merge.task_arithmetic(targets, base=base, weights=weights, lam=lam, normalize=True), label)
    for density in settings["ties_densities"]:
        assert_same(
            merge.ties(targets, base=base, weights=weights, density=float(density)), f"ties_density{density}"
        )
    slerp = settings["slerp"]
    pair = [targets[j] for j in slerp["targets"]]
    assert_same(merge.slerp(pair, t=slerp["t"]), f"slerp_{slerp['t']}", "slerp")
    line = settings["slerp_colinear"]
    vector = targets[line["target"]][line["tensor"]]
    seen.add("slerp_colinear")
    found = formulas.slerp(vector, line["factor"] * vector, line["t"])
    assert_close(golden, found, record["slerp_colinear"], "slerp", dtype, "slerp_colinear")
    dare = settings["dare"]
    delta = targets[dare["target"]][dare["tensor"]] - base[dare["tensor"]]
    mask = torch.from_numpy(record["dare_mask"].astype(bool))
    for rule, name in (("density", f"dare_rescale_density{dare['density']}"), ("l1", "dare_rescale_l1")):
        seen.add(name)
        found = formulas.dare_rescale(delta, mask, dare["density"], rescale=rule)
        assert_close(golden, found, record[name], "value", dtype, name)
    assert set(record) - seen - {"dare_mask"} == set()
