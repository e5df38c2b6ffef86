"""The demo and the benchmark, on smaller settings."""

import json

import pytest

from fusion_core.bench import Bench
from fusion_core.testing import run_cli
from ot_fusion import bench as bench_module
from ot_fusion import demo as demo_module
from ot_fusion.cli import main
from ot_fusion.digits import load_digits, train_mlp, train_vit


def test_demo_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(
        demo_module, "train_mlp", lambda data, width, seed: train_mlp(data, width, seed, epochs=3)
    )
    monkeypatch.setattr(demo_module, "WIDTHS", (32, 128))
    done = run_cli(main, "demo", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == "ok"
    assert {figure["file"] for figure in found["figures"]} == {"barrier.png", "maps.png", "costs.png"}
    tables = {table["title"]: table for table in found["tables"]}
    rows = {
        row["method"]: row["mean"]
        for row in tables["A network with duplicated neurons, fused back (alpha 0)"]["rows"]
    }
    assert rows["exact maps"] < 1e-4 < rows["paper maps"] < rows["official maps"]
    assert [claim["shown"] for claim in found["claims"]][3] is True
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_full_demo_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(
        demo_module, "train_mlp", lambda data, width, seed: train_mlp(data, width, seed, epochs=1)
    )
    short = lambda data, seed, epochs=2, lr=3e-3, model=None: train_vit(
        data, seed, epochs=1, lr=lr, model=model
    )
    monkeypatch.setattr(demo_module, "train_vit", short)
    found = demo_module.demo(tmp_path, full=True)
    table = next(table for table in found.tables if table.title == "Tiny vision transformers, one-shot")
    rows = {
        (row["method"], seed): value
        for row in table.rows()
        for seed, value in zip(table.seeds, row["values"], strict=True)
    }
    assert len([claim for claim in found.claims if claim.text.startswith("Vision")]) == 3
    # the aligned source is the source: the anchor of pair (2, 0) is the source of pair (0, 1)
    assert rows["the source, aligned, not mixed", 0] == pytest.approx(rows["the anchor alone", 2])


def test_digits_are_the_recorded_split():
    data = load_digits()
    assert (len(data.train), len(data.test)) == (1297, 500)
    assert float(data.train.max()) == 1.0


def test_benchmark_in_small(monkeypatch):
    found = bench_module.run(repeats=1, quick=True, memory=False)
    assert isinstance(found, Bench)
    names = [row["name"] for row in found.to_dict()["rows"]]
    assert names[0] == "W1, whole flow against exact cdist"
    assert all(row["ratio"] > 0 for row in found.to_dict()["rows"])


def test_the_reference_path_agrees_with_ours():
    work = bench_module._w1(quick=True)
    ours, plain = work.run(), work.run("exact")
    for key, value in ours.state.items():
        assert float((plain.state[key] - value).abs().max()) < 1e-4, key
