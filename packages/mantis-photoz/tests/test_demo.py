"""The demo in quick mode on few galaxies, and the verbs train, simulate and convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mantis_files import TINY

from fusion_core.demo import run_demo
from fusion_core.testing import run_cli
from mantis_photoz import demo as module
from mantis_photoz.cli import main
from mantis_photoz.config import EARLY, FusionConfig, TrainConfig
from mantis_photoz.convert import to_official
from mantis_photoz.train_checkpoints import MODELS, drawn_masses, folder_name, model_config, recipe
from mantis_photoz.training import new_model


@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(module.OBJECTS, "quick", 80)
    monkeypatch.setitem(module.EXPLAINED, "quick", 30)
    found = run_demo(module.method, tmp_path / "out", seed=0)
    assert found["status"] == "ok"
    methods = {row["method"] for row in found["tables"][0]["rows"]}
    assert methods == {*module.NAMES.values(), module.RECALIBRATED}
    assert {claim["shown"] for claim in found["claims"]} >= {True, None}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "cutouts.png",
        "zz.png",
        "pit.png",
        "shapley.png",
        "stacks.png",
        "result.json",
        "report.html",
    }
    assert json.loads((tmp_path / "out" / "result.json").read_text())["settings"]["test galaxies"] == 80


def test_verdict_follows_the_numbers() -> None:
    from fusion_core.comparison import Comparison
    from mantis_photoz.band_use import BandUse

    def verdicts(late: float, after: float, galex: float) -> list[bool | None]:
        table = Comparison(module.METRICS, module.NAMES["sim-ps1"], [0])
        values = {"sim-ps1": 0.03, "sim-early": 0.02, "sim-late": late}
        for name, nmad in values.items():
            for metric in module.METRICS:
                table.add(module.NAMES[name], metric, 0, 0.08 if metric == "pit_ks" else nmad)
        for metric in module.METRICS:
            table.add(module.RECALIBRATED, metric, 0, after)
        rows = [{"player": n, "shapley": v, "error": 0.001} for n, v in (("galex", galex), ("ps1", 0.05))]
        return [claim.shown for claim in module._claims(table, BandUse(rows=rows), [0], 800)]

    assert verdicts(0.0205, 0.04, 0.01) == [True, True, True, True, None]
    assert verdicts(0.03, 0.09, -0.002) == [True, False, False, False, None]


def test_recipes_are_the_recorded_ones() -> None:
    counts = {name: sum(p.numel() for p in new_model(model_config(name), 0).parameters()) for name in MODELS}
    assert 150_000 < counts["sim-early"] < 170_000
    assert 165_000 < counts["sim-late"] < 190_000
    settings = recipe("sim-early-dropout")
    assert (settings.lr, settings.weight_decay, settings.batch_size) == (2e-3, 1e-4, 64)
    assert settings.survey_dropout == {"galex": 0.15, "ps1": 0.05, "unwise": 0.15}
    assert folder_name("sim-late", 0) == "sim-late"
    assert folder_name("sim-late", 2) == "sim-late-2"


def test_masses_of_the_training_set() -> None:
    from mantis_photoz.simulate import simulate

    masses = drawn_masses(simulate(30, seed=0), model_config("sim-early"))
    assert len(masses) == 120
    assert min(masses) > 0
    assert sum(masses) == pytest.approx(1, abs=1e-5)


def test_simulate_verb(tmp_path: Path) -> None:
    result = run_cli(main, "simulate", "3", "--out", str(tmp_path / "sky"), "--seed", "4", "--json")
    assert result.code == 0
    assert json.loads(result.stdout)["objects"] == 3
    assert (tmp_path / "sky" / "catalog.ecsv").is_file()
    again = run_cli(main, "simulate", "3", "--out", str(tmp_path / "sky"))
    assert again.code == 2
    assert "not empty" in again.stderr


def settings_file(path: Path, **changes: Any) -> Path:
    TrainConfig(model=TINY, epochs=1, batch_size=8, **changes).save(path)
    return path


def test_train_verb(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    assert run_cli(main, "simulate", "24", "--out", str(tmp_path / "sky"), "--quiet").code == 0
    arguments = ["--catalog", str(tmp_path / "sky/catalog.ecsv"), "--cutouts", str(tmp_path / "sky")]
    file = settings_file(tmp_path / "small.toml")
    run = [
        "train",
        str(file),
        *arguments,
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--quiet",
        "--json",
    ]
    result = run_cli(main, *run, "--set", "lr=0.001")
    assert result.code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["epochs"] == 1
    assert TrainConfig.load(tmp_path / "run/training.json").lr == 0.001
    estimated = run_cli(
        main, "estimate", arguments[1], "--cutouts", arguments[3], "--model", str(tmp_path / "run"),
        "--out", str(tmp_path / "z.ecsv"), "--device", "cpu", "--quiet",
    )  # fmt: skip
    assert estimated.code == 0, estimated.stderr
    assert run_cli(main, *run).code == 2
    wrong = run_cli(main, *run, "--overwrite", "--set", "epoch=3")
    assert wrong.code == 2
    assert "did you mean epochs" in wrong.stderr


def test_convert_verb(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    config = FusionConfig.official("early", encoders={EARLY: "convnext_atto"}, bins=8, hidden=6)
    model = new_model(config, 0)
    torch.save(to_official(model.state_dict(), config), tmp_path / "best_early.pt")
    result = run_cli(
        main, "convert", str(tmp_path / "best_early.pt"), "--out", str(tmp_path / "ours"), "--json"
    )
    assert result.code == 0, result.stderr
    assert json.loads(result.stdout)["parameters"] == sum(p.numel() for p in model.parameters())
    missing = run_cli(main, "convert", str(tmp_path / "none.pt"), "--out", str(tmp_path / "other"))
    assert missing.code == 2
    assert not (tmp_path / "other").exists()
