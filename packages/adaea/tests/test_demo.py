import json
import re

import numpy as np
import pytest
import torch

from adaea import demo as demo_module
from adaea import train_zoo
from adaea.scenes import CAPTIONS, FOLDER, SCENES, load_scenes, make_scenes
from adaea.zoo import ARCHITECTURES, BLACK_BOXES, SURROGATES, load_network, make_network
from fusion_core.demo import run_demo
from fusion_core.errors import InputError
from fusion_core.processes import second_process
from fusion_core.seeding import generator


def test_the_shipped_networks_are_as_good_as_their_record_says():
    images, labels = load_scenes()
    record = json.loads((FOLDER / "zoo.json").read_text())["networks"]
    assert list(record) == list(ARCHITECTURES) == list(train_zoo.RECIPES)
    assert set(SURROGATES) | set(BLACK_BOXES) == set(ARCHITECTURES)
    card = (FOLDER / "MODEL_CARD.md").read_text()
    for name, facts in record.items():
        network = load_network(name)
        assert not network.training
        with torch.no_grad():
            accuracy = float((network(images).argmax(1) == labels).float().mean())
        assert accuracy == pytest.approx(facts["accuracy"], abs=0.004)
        assert sum(p.numel() for p in network.parameters()) == facts["parameters"]
        assert f"| {name} |" in card
        assert f"{facts['accuracy']:.3f} |" in card


def test_what_ships_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5e6


def test_the_shipped_crops_are_made_by_the_script():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    images, labels = make_scenes(20, "test")
    shipped, names = load_scenes(20)
    np.testing.assert_allclose(images.float() / 255, shipped, atol=1 / 255 + 1e-6)
    assert torch.equal(labels, names)
    assert len(CAPTIONS) == len(SCENES) == 10
    train, _ = make_scenes(20, "train")
    assert train.shape == images.shape
    with pytest.raises(InputError, match="part is 'both'"):
        make_scenes(2, "both")
    with pytest.raises(InputError, match="limit is 0"):
        load_scenes(0)
    with pytest.raises(InputError, match="wanted one of res16"):
        make_network("alexnet")


@pytest.mark.parametrize("adversarial", [False, True])
def test_training_learns(adversarial):
    draw = generator(0, "test")
    labels = torch.arange(128) % 10
    images = (labels.view(-1, 1, 1, 1) / 10 + 0.05 * torch.rand(128, 3, 32, 32, generator=draw)).clamp(0, 1)
    network = make_network("mixer8")
    before = torch.nn.functional.cross_entropy(network(images), labels).item()
    train_zoo.train(network, images, labels, train_zoo.Recipe(3, adversarial=adversarial), seed=0)
    assert torch.nn.functional.cross_entropy(network(images), labels).item() < before - 0.2
    assert not network.training


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo_module, "IMAGES", {"quick": 6, "full": 8})
    monkeypatch.setattr(demo_module, "SETTINGS", {"alpha": 8 / 255, "steps": 2})
    monkeypatch.setattr(
        demo_module, "second_process", lambda: second_process(wanted=False)
    )  # its job runs here


@pytest.mark.parametrize("full", [False, True])
def test_the_demo_writes_everything_and_claims_what_it_counted(tmp_path, short, full, capsys):
    threads = torch.get_num_threads()
    document = run_demo(demo_module.method, tmp_path / "out", full=full)
    assert torch.get_num_threads() == threads
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"result.json", "report.html", "grid.png", "weights.png", "curve.png"} <= names
    rows = document["tables"][0]["rows"]
    assert {row["method"] for row in rows} == set(demo_module.FULL if full else demo_module.QUICK)
    assert all(len(row["values"]) == 3 for row in rows)
    pairs = document["settings"]["pairs"]
    assert [pair["model"] for pair in pairs] == [*BLACK_BOXES, "res_squeeze"]
    for pair in pairs:
        assert pair["Ens"]["low"] <= pair["Ens"]["value"] <= pair["Ens"]["high"]
        assert 0 <= pair["p"] <= 1
    said = re.search(r"on (\d+) images, Ens on (\d+) .*p [=<] ([\d.]+)", document["claims"][0]["sentence"])
    assert said is not None
    shown = int(said[1]) > int(said[2]) and float(said[3]) < 0.05
    assert document["claims"][0]["shown"] is shown
    assert len(document["claims"]) == (4 if full else 3)
    assert any("not ImageNet" in note for note in document["notes"])
    assert "own or may test" in capsys.readouterr().out


def test_the_sign_test_counts_images():
    def outcome(*rows):
        won = {name: [torch.tensor(row, dtype=torch.bool)] for name, row in zip("ab", rows, strict=True)}
        ones = {name: [torch.ones(3, dtype=torch.bool)] for name in "ab"}
        return demo_module._Outcome(ones, won, [], [1.0], torch.zeros(0), torch.zeros(0))

    first, second = outcome([1, 1, 0], [1, 0, 0]), outcome([0, 1, 1], [0, 0, 1])
    assert demo_module.sign_test(first, second, ["a", "b"]) == (1, 1, 1.0)
