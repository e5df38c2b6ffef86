"""Merging: laws, both sides of every row, streaming, resuming, recipes, bad input."""

import json
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat import merge
from fusechat.errors import IncompatibleCheckpoints
from fusechat.merge import formulas, streaming
from fusechat.merge.rules import BLOCK, Dare, Varm
from fusion_core.checkpoint import save_tensors
from fusion_core.errors import CheckpointError, ConfigError, InputError
from fusion_core.shards import ShardReader
from fusion_core.testing import kill_when

law = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)
NAMES = {
    "model.embed_tokens.weight": (7, 3),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.mlp.up_proj.weight": (5, 4),
    "model.layers.1.self_attn.q_proj.weight": (4, 4),
    "model.layers.1.mlp.up_proj.weight": (5, 4),
    "model.norm.weight": (4,),
}


def draw(seed, scale=1.0, dtype=torch.float64, names=NAMES):
    draws = torch.Generator().manual_seed(seed)
    return {
        k: (scale * torch.randn(s, generator=draws, dtype=torch.float64)).to(dtype) for k, s in names.items()
    }


def moved(base, seed, scale=0.05):
    step = draw(seed, scale)
    return {k: (v.double() + step[k]).to(v.dtype) for k, v in base.items()}


def family(seed, count=3, dtype=torch.float64):
    base = draw(seed, dtype=dtype)
    return base, [moved(base, seed + j + 1, 0.02 * (j + 1)) for j in range(count)]


def assert_same(found, wanted, atol=1e-12):
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=atol, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


METHODS = {
    "linear": lambda t, b: merge.linear(t),
    "varm": lambda t, b: merge.varm(t, base=b),
    "varm-layer": lambda t, b: merge.varm(t, base=b, level="layer"),
    "varm-module": lambda t, b: merge.varm(t, base=b, level="module"),
    "varm-model": lambda t, b: merge.varm(t, base=b, level="model"),
    "varm-element": lambda t, b: merge.varm(t, base=b, level="element"),
    "sce-1": lambda t, b: merge.sce(t, base=b, tau=1.0),
    "sce-0.5": lambda t, b: merge.sce(t, base=b, tau=0.5),
    "sce-0.1": lambda t, b: merge.sce(t, base=b, tau=0.1),
    "sce-fusechat": lambda t, b: merge.sce(t, base=b, tau=0.5, variant="fusechat"),
    "task": lambda t, b: merge.task_arithmetic(t, base=b, weights=[1 / len(t)] * len(t)),
    "ties": lambda t, b: merge.ties(t, base=b, density=1.0),
}


@pytest.mark.parametrize("name", METHODS)
@law
@given(seed=seeds)
def test_copies_merge_to_the_copy(name, seed):
    base, targets = family(seed, 1)
    copies = [dict(targets[0]) for _ in range(3)]
    assert_same(METHODS[name](copies, base).state_dict(), targets[0])


@pytest.mark.parametrize("name", ["linear", "varm", "varm-element", "sce-1", "sce-0.5"])
@law
@given(seed=seeds)
def test_the_order_of_targets_does_not_matter(name, seed):
    base, targets = family(seed)
    assert_same(METHODS[name](targets[::-1], base).state_dict(), METHODS[name](targets, base).state_dict())


@law
@given(seed=seeds, factor=st.floats(1e-6, 100.0))
def test_weights_are_on_the_simplex_whatever_the_scale(seed, factor):
    base, targets = family(seed)
    scaled = [{k: base[k] + factor * (t[k] - base[k]) for k in base} for t in targets]
    for make in (merge.varm, merge.sce):
        plain, other = (make(t, base=base).weights().flat_rows() for t in (targets, scaled))
        for row, again in zip(plain, other, strict=True):
            values = [row[f"target {j}"] for j in range(3)]
            assert sum(values) == pytest.approx(1)
            assert min(values) >= 0
            assert [again[f"target {j}"] for j in range(3)] == pytest.approx(values, rel=1e-4, abs=1e-6)


@law
@given(seed=seeds)
def test_sce_stays_between_the_pivot_and_the_extreme_changes(seed):
    base, targets = family(seed)
    found = merge.sce(targets, base=base, tau=1.0).state_dict()
    for key, value in base.items():
        deltas = torch.stack([t[key] - value for t in targets])
        low, high = deltas.amin(0).clamp(max=0), deltas.amax(0).clamp(min=0)
        step = found[key] - value
        assert bool(((step >= low - 1e-12) & (step <= high + 1e-12)).all())


BIG = {
    "model.layers.0.mlp.up_proj.weight": (3 * BLOCK // 64 + 5, 64),
    "model.norm.weight": (40,),
    "steps": (),
}


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    place = tmp_path_factory.mktemp("big")
    base = draw(0, dtype=torch.bfloat16, names=BIG)
    base["steps"] = torch.tensor(7)
    states = {"base": base}
    for j in range(2):
        states[f"t{j}"] = {
            k: v
            if k == "steps"
            else (
                v.float()
                + 0.02 * (j + 1) * torch.randn(v.shape, generator=torch.Generator().manual_seed(j + 9))
            ).to(v.dtype)
            for k, v in base.items()
        }
    for name, state in states.items():
        (place / name).mkdir()
        save_tensors(place / name / "model.safetensors", state)
        (place / name / "config.json").write_text("{}")
    return place, states


STREAMED = {
    "varm": lambda t, b, **o: merge.varm(t, base=b, **o),
    "sce": lambda t, b, **o: merge.sce(t, base=b, tau=0.3, **o),
    "ties": lambda t, b, **o: merge.ties(t, base=b, density=0.4, **o),
    "dare": lambda t, b, **o: merge.dare(t, base=b, rescale="l1", **o),
    "slerp": lambda t, b, **o: merge.slerp(t, base=b, **o),
}


def stored(folder):
    reader = ShardReader(folder)
    return {key: reader.get(key) for key in reader}


@pytest.mark.parametrize("name", STREAMED)
def test_the_bits_do_not_hang_on_chunks_shards_or_workers(big, tmp_path, name):
    place, states = big
    paths = [place / "t0", place / "t1"]
    whole = STREAMED[name](paths, place / "base", chunk=16 * BLOCK).state_dict()
    memory = STREAMED[name]([states["t0"], states["t1"]], states["base"]).state_dict()
    for number, (chunk, shard, workers) in enumerate(((BLOCK, 10**9, 1), (2 * BLOCK, 100_000, 3))):
        out = tmp_path / str(number)
        STREAMED[name](paths, place / "base", chunk=chunk).save(out, shard_bytes=shard, num_workers=workers)
        found = stored(out)
        assert (out / "config.json").exists()
        for key, value in whole.items():
            assert torch.equal(found[key], value), (chunk, key)
            assert torch.equal(memory[key], value), key
        assert found["steps"] == 7


def test_low_precision_is_rounded_once(big):
    _, states = big
    found = merge.sce([states["t0"], states["t1"]], base=states["base"], tau=1.0).state_dict()
    key = "model.layers.0.mlp.up_proj.weight"
    exact = [{k: v.double() if v.is_floating_point() else v for k, v in s.items()} for s in states.values()]
    wanted = merge.sce(exact[1:], base=exact[0], tau=1.0).state_dict()[key]
    ours = (found[key].double() - wanted).abs()
    base, *targets = (s[key] for s in states.values())
    rounded = torch.stack([t - base for t in targets])  # in bfloat16, as mergekit subtracts
    weights = formulas.sce_weights(rounded.double().square().sum((1, 2)))
    plain = (formulas.sce_merge(base, rounded, weights.to(rounded)).double() - wanted).abs()
    assert float(ours.max()) <= float(wanted.abs().max()) * 2**-8
    assert float(ours.mean()) < float(plain.mean())


def test_rows_of_the_published_code():
    base, targets = family(3)
    # 1, 2: weights per target against the pivot, every tensor merged
    rows = merge.varm(targets, base=base).weights().flat_rows()
    squares = torch.stack(
        [(t["model.norm.weight"] - base["model.norm.weight"]).square().mean() for t in targets]
    )
    assert [rows[-1][f"target {j}"] for j in range(3)] == pytest.approx((squares / squares.sum()).tolist())
    # 4: a target that left a tensor alone weighs nothing; zero="uniform" averages
    targets[1]["model.norm.weight"] = base["model.norm.weight"].clone()
    assert merge.varm(targets, base=base).weights().flat_rows()[-1]["target 1"] == 0
    assert merge.varm(targets, base=base, zero="uniform").weights().flat_rows()[-1][
        "target 1"
    ] == pytest.approx(1 / 3)
    # 5: selection changes what is merged, or only the weights
    paper, fork = (
        merge.sce(targets, base=base, tau=0.3, variant=v).state_dict() for v in ("paper", "fusechat")
    )
    key = "model.layers.0.mlp.up_proj.weight"
    assert int((paper[key] == base[key]).sum()) > 10
    assert int((fork[key] == base[key]).sum()) == 0
    # 6: small changes do not switch the weights off
    near = [{k: base[k] + 1e-3 * (t[k] - base[k]) for k in base} for t in targets]
    ours = merge.sce(near, base=base, tau=1.0).weights().flat_rows()[0]
    theirs = merge.sce(near, base=base, tau=1.0, variant="mergekit").weights().flat_rows()[0]
    assert theirs["target 0"] == pytest.approx(1 / 3)
    assert ours["target 0"] < 0.2
    # 20: where nothing is selected the pivot's tensor stays
    few = merge.sce(targets, base=base, tau=0.1).state_dict()
    assert torch.equal(few["model.norm.weight"], base["model.norm.weight"])
    # 3, 13 and the floor of the published element level
    floor = Varm("element", floor=1e-13)
    chunk = targets[0]["model.norm.weight"] * 0
    assert torch.equal(formulas.varm_element(chunk[None] + 1, chunk[None], floor=floor.floor), chunk)
    assert torch.equal(formulas.varm_element(chunk[None] + 1, chunk[None]), chunk + 1)


def test_equal_tensors_come_back_to_the_bit():
    base, targets = family(4, dtype=torch.bfloat16)
    for target in targets:
        target["model.norm.weight"] = base["model.norm.weight"].clone()
    for name in ("sce-1", "sce-0.1", "task", "ties"):
        assert torch.equal(
            METHODS[name](targets, base).state_dict()["model.norm.weight"], base["model.norm.weight"]
        )


def test_ties_in_the_variance_are_kept_in_order():
    values = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.5])
    assert formulas.largest(values, 2).tolist() == [False, True, True, False, False]


def test_dare_masks_hang_on_seed_tensor_and_target():
    rule = Dare(0.5, seed=3)
    whole = rule.mask("a", 0, 0, 3 * BLOCK)
    assert torch.equal(whole[BLOCK : 2 * BLOCK], rule.mask("a", 0, BLOCK, BLOCK))
    assert not torch.equal(whole, rule.mask("a", 1, 0, 3 * BLOCK))
    assert not torch.equal(whole, rule.mask("b", 0, 0, 3 * BLOCK))
    assert abs(float(whole.float().mean()) - 0.5) < 0.01


def test_slerp_gradients_over_the_depth():
    _, targets = family(5, 2)
    ends = merge.slerp(targets, t={"self_attn": [0, 1], "mlp": 0.25, "default": 0.5}).weights().flat_rows()
    shares = {row["tensor"]: row["target 1"] for row in ends}
    assert shares["model.layers.0.self_attn.q_proj.weight"] == 0
    assert shares["model.layers.1.self_attn.q_proj.weight"] == 1
    assert shares["model.layers.1.mlp.up_proj.weight"] == 0.25
    assert shares["model.norm.weight"] == 0.5


def test_tables_of_other_sizes():
    base, targets = family(6)
    targets[1]["model.embed_tokens.weight"] = torch.cat(
        [targets[1]["model.embed_tokens.weight"], torch.zeros(2, 3)]
    )
    with pytest.raises(
        IncompatibleCheckpoints, match=r"embed_tokens.weight has shape \(7, 3\) in base.*common"
    ):
        merge.linear(targets, base=base)
    grown = dict(base)
    grown["model.embed_tokens.weight"] = torch.cat([base["model.embed_tokens.weight"], torch.ones(4, 3)])
    found = merge.linear(targets, base=grown, embeddings="common").state_dict()["model.embed_tokens.weight"]
    assert torch.equal(found[7:], torch.ones(4, 3, dtype=torch.float64))
    torch.testing.assert_close(found[:7], sum(t["model.embed_tokens.weight"][:7] for t in targets) / 3)


def merge_until(place, out, last):
    """Merge, and wait to be killed before the tensor of this number; how many tensors were written."""
    plain, count = streaming.Merge._write, [0]

    def counted(self, entry, file):
        count[0] += 1
        if count[0] == last:
            while not Path(f"{out}.partial/journal.txt").exists():
                time.sleep(0.05)  # until the first tensor is noted
            Path(f"{out}.here").touch()
            time.sleep(60)
        return plain(self, entry, file)

    with mock.patch.object(streaming.Merge, "_write", counted):
        merge.sce([place / "t0", place / "t1"], base=place / "base", tau=0.3).save(out)
    return count[0]


def test_a_killed_merge_leaves_nothing_and_goes_on(big, tmp_path):
    place, _ = big
    out = tmp_path / "out"
    assert kill_when([merge_until, place, out, 2], f"{out}.here") != 0
    assert not out.exists()
    assert (tmp_path / "out.partial" / "journal.txt").exists()
    assert merge_until(place, out, None) == len(BIG) - 1  # the first tensor was kept
    whole = merge.sce([place / "t0", place / "t1"], base=place / "base", tau=0.3).state_dict()
    found = stored(out)
    assert all(torch.equal(found[key], value) for key, value in whole.items())
    assert not (tmp_path / "out.partial").exists()


def test_a_file_that_was_half_copied_is_copied_again(big, tmp_path, monkeypatch):
    place, _ = big
    (place / "base" / "config.json").write_text('{"model_type": "llama"}')
    plan = merge.sce([place / "t0", place / "t1"], base=place / "base", tau=0.3)

    def stops(source, target):
        Path(target).write_text('{"model')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fusechat.merge.files.shutil.copyfile", stops)
        with pytest.raises(KeyboardInterrupt):
            plan.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    plan.save(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "llama"}'


def test_a_merge_that_replaces_another_leaves_one_of_them_whole(big, tmp_path, monkeypatch):
    place, _ = big
    models = [place / "t0", place / "t1"]
    merge.linear(models).save(tmp_path / "out")
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}

    def stops(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # what was there is gone only when the new one has its place
        patch.setattr(Path, "rename", stops)
        with pytest.raises(KeyboardInterrupt):
            merge.sce(models, base=place / "base").save(tmp_path / "out", overwrite=True)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    merge.sce(models, base=place / "base").save(tmp_path / "out", overwrite=True)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} != before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out"]


def test_a_dry_run_counts_without_reading(big):
    place, _ = big
    found = merge.sce([place / "t0", place / "t1"], base=place / "base").dry_run(shard_bytes=100_000)
    assert found["tensors"] == 3
    assert found["shards"] == 2
    assert found["bytes_read_once"] == 3 * found["bytes_written"]


def test_recipes_of_mergekit(big, tmp_path):
    place, _ = big
    recipe = {
        "merge_method": "sce",
        "base_model": str(place / "base"),
        "models": [{"model": str(place / "t0")}, {"model": str(place / "t1")}],
        "parameters": {"select_topk": 0.5},
        "dtype": "bfloat16",
    }
    found = merge.from_recipe(recipe).state_dict()
    wanted = merge.sce([place / "t0", place / "t1"], base=place / "base", tau=0.5).state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    (tmp_path / "r.yml").write_text(
        f"merge_method: slerp\nbase_model: {place / 't0'}\nmodels:\n  - model: {place / 't0'}\n  - model: "
        f"{place / 't1'}\nparameters:\n  t:\n    - filter: mlp\n      value: [0, 1]\n    - value: 0.5\n"
    )
    assert merge.from_recipe(tmp_path / "r.yml").weights().flat_rows()[-1]["t1"] == 0.5
    linear = {
        "merge_method": "linear",
        "models": [
            {"model": str(place / "t0"), "parameters": {"weight": 3}},
            {"model": str(place / "t1"), "parameters": {"weight": 1}},
        ],
    }
    assert merge.from_recipe(linear).weights().flat_rows()[0]["t0"] == 3
    for change, words in (
        ({"merge_method": "della"}, "della"),
        ({"slices": []}, "slices"),
        ({"models": None}, "no list of models"),
        ({"parameters": {"select_topk": [1, 2]}}, "wanted a number"),
    ):
        with pytest.raises(ConfigError, match=words):
            merge.from_recipe(recipe | change)
    (tmp_path / "bad.yml").write_text("a: [")
    with pytest.raises(ConfigError, match="no YAML"):
        merge.from_recipe(tmp_path / "bad.yml")
    for text, words in (
        ("merge_method: magic\nmodels: [{model: x}]", "odd.yml: merge_method is 'magic'"),
        (
            "merge_method: linear\nmodels: [{model: nowhere}]",
            "odd.yml: nowhere is nowhere, which does not exist",
        ),
        (
            "merge_method: sce\nmodels: [{model: x}]\nparameters: [1]",
            "odd.yml is no recipe that can be merged",
        ),
    ):
        (tmp_path / "odd.yml").write_text(text)
        with pytest.raises(InputError, match=words):
            merge.from_recipe(tmp_path / "odd.yml")


def test_old_pickles_are_read_without_running_them(tmp_path):
    base, targets = family(7)
    torch.save(base, tmp_path / "pytorch_model.bin")
    found = merge.varm(targets, base=tmp_path / "pytorch_model.bin").state_dict()
    assert_same(found, merge.varm(targets, base=base).state_dict())


def test_damaged_files(big, tmp_path):
    place, _ = big
    (tmp_path / "cut").mkdir()
    data = (place / "t0" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError):
        merge.linear([tmp_path / "cut", place / "t1"]).state_dict()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(InputError, match="not empty"):
        merge.linear([place / "t0", place / "t1"]).save(tmp_path / "full")
    merge.linear([place / "t0", place / "t1"]).save(tmp_path / "full", overwrite=True)
    card = json.loads((tmp_path / "full" / "merge.json").read_text())
    assert card["method"] == "linear"
    assert card["targets"] == ["t0", "t1"]
