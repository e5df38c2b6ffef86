"""Settings and traces as objects: presets, JSON, pickling, tables, pictures."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from adaea import DI, TI, AdaEA, Ens, Momentum, Nesterov, Variance


def test_presets():
    official, usual = AdaEA.official(), AdaEA.literature()
    assert (official.drf, official.eta, official.noise) == ("official", -0.3, 0.001)
    assert official.update == (Momentum(0.9),)
    assert AdaEA.official(update=None).update == ()
    assert (usual.eps, usual.alpha, usual.steps) == (16 / 255, 1.6 / 255, 10)
    assert usual.update == (Momentum(1.0),)
    plain = AdaEA()
    assert (plain.eps, plain.alpha, plain.steps, plain.beta, plain.eta) == (8 / 255, 2 / 255, 10, 10.0, -0.3)
    assert (plain.drf, plain.agm, plain.agm_every, plain.ratio) == ("symmetric", "exact", 1, "given")
    assert AdaEA(norm="l2").eps == 3.0
    assert plain.with_(norm="l2").eps == 3.0
    assert plain.with_(norm="l2", eps=1.0).alpha == 0.25


@pytest.mark.parametrize("kind", [AdaEA, Ens])
def test_settings_survive_json_and_pickle(kind, nets, batch):
    x, y = batch(size=16)
    parts = {"update": [Variance(1), Nesterov(0.5)], "transforms": [DI(0.8), TI(3, "linear")], "target": 1}
    attack = kind(eps=0.1, steps=2, seed=3, **parts)
    config = json.loads(json.dumps(attack.config()))
    assert config["attack"] == kind.__name__
    again = kind.from_config(config, nets(3))
    assert again.config() == attack.config()
    assert torch.equal(again(x, y), attack(x, y, surrogates=nets(3)))
    assert pickle.loads(pickle.dumps(attack)).config() == attack.config()
    assert repr(attack) == repr(pickle.loads(pickle.dumps(attack)))
    assert "eps=0.1" in repr(attack)
    with pytest.raises(AttributeError):
        attack.eps = 1.0


def test_trace(nets, batch, tmp_path):
    x, y = batch(3)
    records = []
    adv, trace = AdaEA(nets(3), agm="per_sample", steps=4, eta=0.2)(x, y, trace=True, on_step=records.append)
    assert trace.weights.shape == (4, 3, 3)
    assert trace.losses.shape == (4, 3, 3)
    assert trace.names == ("net0", "net1", "net2")
    torch.testing.assert_close(trace.kept, trace.keep.double().mean((2, 3, 4)))
    assert torch.equal(records[-1].images, adv)
    assert [record.step for record in records] == [0, 1, 2, 3]
    table = trace.to_dataframe()
    assert table.shape == (12, 6)
    assert table[table.surrogate == "net1"].weight.tolist() == pytest.approx(
        trace.weights[:, 1].mean(-1).tolist()
    )
    for name in ("trace.npz", "trace.json", "trace.jsonl", "trace.safetensors"):
        trace.save(tmp_path / name)
    with np.load(tmp_path / "trace.npz") as arrays:
        assert set(arrays.files) == {"weights", "kept", "losses", "keep", "still", "targets"}
        assert np.array_equal(arrays["weights"], trace.weights.numpy())
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 12
    assert "state" not in json.loads((tmp_path / "trace.json").read_text())
    assert "weights=float64 (4, 3, 3)" in repr(trace)


def test_plot(nets, batch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    _, trace = AdaEA(nets(2), steps=3)(*batch(), trace=True)
    axes = trace.plot()
    assert [line.get_label() for line in axes.lines] == ["net0", "net1"]
    assert axes.lines[0].get_ydata() == pytest.approx(trace.weights[:, 0].tolist())
    assert trace.plot(axes) is axes
