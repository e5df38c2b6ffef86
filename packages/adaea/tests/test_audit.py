import json

import pytest
import torch
from torch import nn

from adaea import AdaEA, AdversarialSet, Ens, audit, compare, evaluate, importance
from adaea.evaluation import predictions
from adaea.zoo import load_network
from fusion_core.checkpoint import load_tensors, save_tensors
from fusion_core.errors import ConfigError, DataError, FusionWarning, InputError, ShapeError, StoreError
from fusion_core.stats import mcnemar


class Net(nn.Module):
    """A tiny classifier whose batch norm and dropout would show if it were left in training mode."""

    def __init__(self, seed, classes=3):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.drop = nn.Dropout(0.5)
            self.fc = nn.Linear(6, classes)

    def forward(self, x):
        return 6 * self.fc(self.drop(torch.tanh(self.norm(self.conv(x))).mean((2, 3))))


@pytest.fixture(scope="module")
def data():
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(10, 3, 12, 12, generator=draw)
    labels = predictions(Net(0), images)
    labels[-1] = (labels[-1] + 1) % 3
    return images, labels


@pytest.fixture(scope="module")
def surrogates():
    return {"a": Net(1), "b": Net(2), "c": Net(3)}


ATTACKS = {"Ens": Ens(steps=3), "AdaEA": AdaEA(steps=3)}
OPTIONS = {"device": "cpu", "attacks": ATTACKS, "batch_size": 4}


@pytest.fixture(scope="module")
def report(data, surrogates):
    return audit(Net(0), surrogates=surrogates, data=data, eps=[0.0, 0.1], defences=["bits:2"], **OPTIONS)


def test_the_table_has_every_cell_and_agrees_with_the_sets(report, data):
    images, labels = data
    models = {"my_model", "my_model+bits:2", "a", "b", "c"}
    cells = {(row["attack"], row["eps"], row["model"], row["pixels"]) for row in report.rows}
    assert len(cells) == len(report.rows) == 2 * 2 * 2 * len(models)
    before = predictions(Net(0), images)
    for attack in ATTACKS:
        made = report.set(attack)
        after = predictions(Net(0), made.adversarial)
        right = before == labels
        wanted = float((right & (after != labels)).sum() / right.sum())
        found = report.asr(attack, "my_model")
        assert found.value == pytest.approx(wanted)
        assert found.low <= found.value <= found.high
        assert float((made.adversarial - images).abs().max()) <= 0.1 + 1e-6
        rounded = made.rounded().adversarial
        assert report.asr(attack, "my_model", pixels="uint8").value == pytest.approx(
            float((right & (predictions(Net(0), rounded) != labels)).sum() / right.sum())
        )


def test_no_budget_no_success(report, data):
    assert torch.equal(report.set("AdaEA", 0.0).adversarial, data[0])
    assert report.asr("AdaEA", "my_model", 0.0).value == 0.0
    assert report.asr("AdaEA", "my_model", 0.0, rate="official").value == pytest.approx(0.0)


def test_paired_tests_worst_and_gate(report):
    for row in report.tests:
        assert row["p"] == mcnemar(row["only attack"], row["only baseline"])
        assert (row["attack"], row["baseline"]) == ("AdaEA", "Ens")
    worst = report.worst("my_model")
    assert worst["strict"] == max(row["strict"] for row in report.rows if row["model"] == "my_model")
    assert report.above(1.0) == []
    over = report.above(0.0)
    assert {row["kind"] for row in over} == {"target"}
    assert all(row["strict_high"] > 0 for row in over)


def test_printing_and_frames(report):
    text = str(report)
    assert "my_model+bits:2" in text
    assert "own or may test" in text
    assert len(report.to_dataframe()) == len(report.rows)
    page = report.to_html()
    assert "AuditReport" not in page
    assert "Scope of use" in page


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.asr("PGD", "my_model"), "there are the attacks"),
        (lambda r: r.asr("Ens", "nobody"), "no strict rate of 'Ens' against 'nobody'"),
        (lambda r: r.asr("Ens", "my_model", 0.2), "at eps 0.2"),
        (lambda r: r.asr("Ens", "my_model", rate="best"), "rate is 'best'"),
        (lambda r: r.asr("Ens", "my_model", rate="targeted"), "no targeted rate"),
        (lambda r: r.worst("nobody"), "model is 'nobody'"),
        (lambda r: r.set("PGD"), "no set of 'PGD'"),
    ],
)
def test_unknown_cells_list_what_there_is(report, call, words):
    with pytest.raises(InputError, match=words):
        call(report)


def test_models_data_and_random_numbers_come_back_untouched(data, surrogates):
    target = Net(0).train()
    nets = [target, *surrogates.values()]
    for net in nets:
        net.train()
        net.fc.weight.grad = torch.ones_like(net.fc.weight)
        net.conv.weight.requires_grad_(False)
    before = [{key: value.clone() for key, value in net.state_dict().items()} for net in nets]
    images, state = data[0].clone(), torch.get_rng_state()
    audit(target, surrogates=surrogates, data=data, defences=["resize-pad"], **OPTIONS)
    for net, old in zip(nets, before, strict=True):
        assert net.training
        assert net.drop.training
        assert bool((net.fc.weight.grad == 1).all())
        assert not net.conv.weight.requires_grad
        assert net.fc.weight.requires_grad
        assert all(torch.equal(value, old[key]) for key, value in net.state_dict().items())
    assert torch.equal(data[0], images)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_target_may_be_any_callable(data, surrogates):
    net = Net(0).eval()
    with torch.no_grad():
        whole = audit({"f": lambda x: net(x).argmax(1).numpy()}, surrogates=surrogates, data=data, **OPTIONS)
        named = audit(net, surrogates=surrogates, data=data, name="f", **OPTIONS)
    assert [row["strict"] for row in whole.rows] == [row["strict"] for row in named.rows]


@pytest.mark.parametrize("target", [1, "random", "least-likely", lambda y, z: (y + 1) % 3])
def test_targeted(data, surrogates, target):
    found = audit(Net(0), surrogates=surrogates, data=data, target=target, eps=0.3, **OPTIONS)
    made = found.set("AdaEA")
    assert made.targets is not None
    if target == "random" or callable(target):
        assert bool((made.targets != data[1]).all())
    row = found.worst("my_model")
    assert 0 <= row["targeted_low"] <= row["targeted"] <= row["targeted_high"] <= 1
    again = audit(Net(0), surrogates=surrogates, data=data, target=target, eps=0.3, **OPTIONS)
    assert again.set("AdaEA").digest() == made.digest()


def test_save_and_resume(tmp_path, data, surrogates, report, monkeypatch):
    report.save(tmp_path / "saved", png=True)
    again = AdversarialSet.load(tmp_path / "saved" / "adv" / "AdaEA-eps25_5.safetensors")
    assert again.digest() == report.set("AdaEA").digest()
    whole = audit(Net(0), surrogates=surrogates, data=data, out=tmp_path / "run", **OPTIONS)
    shards = tmp_path / "run" / "adv" / ".work" / "Ens-eps8"
    shards.mkdir(parents=True)  # as if killed between the set's writing and the shards' removal
    (shards / "manifest.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(AdaEA, "__call__", None)  # nothing is attacked again
        resumed = audit(
            Net(0), surrogates=surrogates, data=data, out=tmp_path / "run", resume=True, **OPTIONS
        )
    assert json.dumps(resumed.to_dict()) == json.dumps(whole.to_dict())
    assert not shards.parent.exists()
    trace = tmp_path / "run" / "adv" / "Ens-eps8.trace.safetensors"
    kept = load_tensors(trace)
    for other in ({"kept": kept["kept"]}, kept | {"losses": kept["losses"][:1]}):
        save_tensors(trace, other)  # a trace that is none: the attack is made again
        audit(Net(0), surrogates=surrogates, data=data, out=tmp_path / "run", resume=True, **OPTIONS)
        assert all(torch.equal(value, kept[name]) for name, value in load_tensors(trace).items())
    with pytest.raises(StoreError, match="seed"):
        audit(Net(0), surrogates=surrogates, data=data, out=tmp_path / "run", resume=True, seed=1, **OPTIONS)
    other = {**surrogates, "a": Net(9)}
    with pytest.raises(StoreError, match="surrogates"):
        audit(Net(0), surrogates=other, data=data, out=tmp_path / "run", resume=True, **OPTIONS)
    with pytest.raises(InputError, match="resume=True or overwrite=True"):
        audit(Net(0), surrogates=surrogates, data=data, out=tmp_path / "run", **OPTIONS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        audit(Net(0), surrogates=surrogates, data=data, out=tmp_path / "mine", overwrite=True, **OPTIONS)


def test_an_interrupted_audit_keeps_its_batches(tmp_path, data, surrogates, monkeypatch):
    calls = []
    attack = AdaEA.__call__

    def stop(self, images, labels, **options):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attack(self, images, labels, **options)

    options = {**OPTIONS, "attacks": {"AdaEA": AdaEA(steps=2)}}
    monkeypatch.setattr(AdaEA, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        audit(Net(0), surrogates=surrogates, data=data, out=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "asr.json").exists()
    found = audit(Net(0), surrogates=surrogates, data=data, out=tmp_path / "run", resume=True, **options)
    assert calls == [4, 4, 2, 2]
    monkeypatch.undo()
    whole = audit(Net(0), surrogates=surrogates, data=data, **options)
    assert found.set("AdaEA").digest() == whole.set("AdaEA").digest()


def test_without_matplotlib_the_report_has_no_pictures(tmp_path, report, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(FusionWarning, match=r'no pictures.*pip install "adaea\[plot\]"'):
        report.save(tmp_path / "bare")
    assert (tmp_path / "bare" / "report.html").is_file()
    assert not (tmp_path / "bare" / "grid.png").exists()


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"surrogates": {}}, InputError, "empty"),
        ({"surrogates": {"f": lambda x: x}}, InputError, "wanted a torch.nn.Module with gradients"),
        ({"surrogates": {"a": Net(1), "b": Net(2, 4)}}, ShapeError, "3 classes and 'b' has 4"),
        ({"model": {}}, InputError, "empty"),
        ({"model": {"x": 3}}, InputError, "x: int"),
        ({"attacks": {}}, InputError, "attacks is empty"),
        ({"eps": []}, ConfigError, "eps is"),
        ({"eps": [-0.1]}, ConfigError, "eps is"),
        ({"batch_size": 0}, InputError, "batch_size is 0"),
        ({"resume": True}, ConfigError, "need out"),
        ({"defences": ["gzip"]}, ConfigError, "defence is 'gzip'"),
        ({"data": (torch.rand(2, 3, 12, 12), torch.tensor([0, 7]))}, DataError, "7"),
        ({"model": nn.Identity()}, InputError, "wanted logits"),
        ({"target": "best"}, ConfigError, "target is 'best'"),
        ({"target": 8}, DataError, "8"),
    ],
)
def test_bad_arguments_are_named(data, surrogates, change, kind, words):
    arguments = {"surrogates": surrogates, "data": data, **OPTIONS, **change}
    with pytest.raises(kind, match=words):
        audit(arguments.pop("model", Net(0)), **arguments)


def test_evaluate_and_compare(tmp_path, report, surrogates):
    made = report.set("AdaEA")
    made.save(tmp_path / "a.safetensors")
    found = evaluate(str(tmp_path / "a.safetensors"), {"mine": Net(0), **surrogates})
    assert found.rows[0]["strict"] == report.asr("AdaEA", "my_model").value
    assert found.rows[1]["pixels"] == "uint8"
    shown = found.shown_rows()[0]
    assert len(shown) < 13 < len(found.rows[0])
    assert shown["strict %"].startswith(f"{100 * found.rows[0]['strict']:.1f} [")
    with pytest.raises(DataError, match="no clean images"):
        evaluate(AdversarialSet(made.adversarial, made.labels), Net(0))
    with pytest.raises(DataError, match="row 9, but the data has 3"):
        evaluate(AdversarialSet(made.adversarial, made.labels), Net(0), clean=made.clean[:3])
    given = evaluate(AdversarialSet(made.adversarial, made.labels), Net(0), clean=made.clean)
    assert given.rows[0]["strict"] == found.rows[0]["strict"]
    paired = compare(made, report.set("Ens"), {"my_model": Net(0)})
    test = next(row for row in report.tests if row["model"] == "my_model" and row["eps"] == 0.1)
    assert (paired.rows[0]["only AdaEA"], paired.rows[0]["only Ens"]) == (
        test["only attack"],
        test["only baseline"],
    )
    assert paired.rows[0]["p"] == test["p"]


def test_sets_of_other_data_are_not_compared(report):
    made = report.set("AdaEA")
    parts = {"labels": made.labels, "clean": made.clean}
    far = AdversarialSet(made.adversarial, **parts, index=torch.arange(10) + 100)
    with pytest.raises(DataError, match="no image in common"):
        compare(made, far, Net(0))
    relabelled = AdversarialSet(made.adversarial, (made.labels + 1) % 3, made.clean)
    with pytest.raises(DataError, match="different labels"):
        compare(made, relabelled, Net(0))
    moved = AdversarialSet(made.adversarial, made.labels, 1 - made.clean)
    with pytest.raises(DataError, match="different clean images"):
        compare(made, moved, Net(0))
    half = AdversarialSet(made.adversarial[5:], made.labels[5:], made.clean[5:], index=torch.arange(5, 10))
    row = compare(made, half, Net(0)).rows[0]
    assert (row["images"], row["only AdaEA"], row["p"]) == (5, 0, 1.0)


def test_importance_finds_the_copy_of_the_target(data):
    stand_ins = {"copy": Net(0), "x": Net(5), "y": Net(6)}
    found = importance(Net(0), surrogates=stand_ins, data=data, attack=Ens(steps=4), eps=0.05, device="cpu")
    assert [row["left out"] for row in found.rows[:2]] == ["none", "copy"]
    assert found.rows[1]["fall"] >= 0
    for row in found.rows[1:]:
        assert row["fall"] == pytest.approx(found.rows[0]["strict"] - row["strict"])
    with pytest.raises(InputError, match="at least two"):
        importance(Net(0), surrogates={"a": Net(1)}, data=data, device="cpu")


def test_l2(data, surrogates):
    attacks = {"AdaEA": AdaEA(norm="l2", steps=3)}
    found = audit(Net(0), surrogates=surrogates, data=data, attacks=attacks, eps=1.0, device="cpu")
    made = found.set("AdaEA")
    assert float((made.adversarial - data[0]).flatten(1).norm(dim=1).max()) <= 1 + 1e-5
    assert found.settings["norm"] == "l2"


def test_shipped_networks_audit_from_loaders():
    from adaea.scenes import load_scenes

    images, labels = load_scenes(8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=3)
    found = audit(load_network("vgg12"), surrogates="zoo:res16,zoo:vit8", data=loader, limit=7, **OPTIONS)
    assert found.settings["images"] == 7
    assert len(found.set("Ens")) == 7


def test_half_precision_forwards_keep_the_budget(data, surrogates):
    found = audit(Net(0), surrogates=surrogates, data=data, dtype="bfloat16", eps=0.1, **OPTIONS)
    made = found.set("AdaEA")
    assert made.adversarial.dtype is torch.float32
    assert float((made.adversarial - data[0]).abs().max()) <= 0.1 + 1e-6
    whole = audit(Net(0), surrogates=surrogates, data=data, eps=0.1, **OPTIONS)
    assert made.digest() != whole.set("AdaEA").digest()
    with pytest.raises(ConfigError, match="dtype is 'float64'"):
        audit(Net(0), surrogates=surrogates, data=data, dtype="float64", **OPTIONS)
