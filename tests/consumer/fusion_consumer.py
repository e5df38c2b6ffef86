"""Two networks become one, two small models steer a large one, and densities are mended: as a user would."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch
from torch import Tensor, nn

import mantis_photoz
import ot_fusion
from fusion_core import ConfigError, FusionError, InputError
from fusion_core.report import Report
from fusion_core.seeding import generator
from logit_fusion import (
    FusionConfig,
    FusionStep,
    NonFiniteLogitsError,
    VocabularyMismatchError,
    fuse_logits,
    merge_task_vectors,
)
from mantis_photoz import SURVEYS, BinnedPDF, Survey, calibrate, metrics
from mantis_photoz.calibrate import Chain
from mantis_photoz.report import Evaluation, evaluate
from ot_fusion import Fused, Plan, align, check_equivalence, diagnose, fuse, interpolate
from ot_fusion.spec import AlignmentSpec, infer_spec, verify_spec


def network(width: int) -> nn.Sequential:
    """A small classifier of eight numbers."""
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


def join(out: Path) -> dict[str, float]:
    """Fuse two networks, prove an alignment, and save what came of it."""
    wide, small, inputs = network(32), network(16), torch.randn(64, 8, generator=generator(0, "inputs"))
    config = ot_fusion.FusionConfig(solver="emd", transform="none").replace(samples=64)
    assert_type(config, ot_fusion.FusionConfig)

    fused = fuse({"wide": wide, "small": small}, anchor="small", data=inputs, config=config)
    assert_type(fused, Fused)
    assert_type(fused.maps, dict[str, Plan])
    assert_type(fused.model, nn.Module | None)
    assert_type(fused.report, Report)
    fused.report.save(out / "fusion")
    fused.save_pretrained(out / "fused", parents={"wide": "wide", "small": "small"})

    hard = align(small, to=network(16))
    if hard.model is None:
        raise TypeError("modules were given, so a module comes back")
    gap = check_equivalence(small, hard.model, inputs)
    curve = interpolate(small, hard.model, steps=3).evaluate(lambda model: float(model(inputs).norm()))
    spec = infer_spec(wide, inputs[:2])
    assert_type(spec, AlignmentSpec)
    verify_spec(wide, spec, inputs[:4])
    print(diagnose(wide, small).sentence)
    assert_type(gap.max_abs, float)
    assert_type(curve.barrier, float)
    shares = [plan.identity_share() for plan in fused.maps.values()]
    return {"gap": gap.max_abs, "barrier": curve.barrier, "share": max(shares), **fused.weights}


def steer(out: Path) -> dict[str, float]:
    """Shift a large model's logits by what fine-tuning did to small ones, with settings from a file."""
    FusionConfig(strategy="single", solver="grid").save(out / "fusion.toml")
    config = FusionConfig.load(out / "fusion.toml").override(["step=0.05"])
    assert_type(config, FusionConfig)

    large, base, math, chat = torch.randn(4, 2, 50, generator=generator(0, "logits"))
    step = fuse_logits(large, base, [math, chat], strategy=config.strategy, step=config.step)
    assert_type(step, FusionStep)
    assert_type(step.log_probs, Tensor)
    step.check(["large", "base", "math", "chat"])

    merged = merge_task_vectors(network(4), [network(4), network(4)], lam=0.3)
    assert_type(merged, nn.Sequential)
    state = merge_task_vectors({"w": torch.zeros(2)}, {"one": {"w": torch.ones(2)}}, lam=[0.5])
    assert_type(state, dict[str, Tensor])
    mass = float(step.log_probs[0].exp().sum())
    return {"alpha": float(step.alpha.max()), "mass": mass, "w": float(state["w"][0])}


def mend(out: Path) -> dict[str, float]:
    """Recalibrate redshift densities that are too narrow, and report on both."""
    rng = np.random.default_rng(0)
    center = rng.uniform(0.2, 1.2, 600)
    edges = np.linspace(0, 1.6, 81)
    mass = np.exp(-0.5 * ((edges[:-1] - center[:, None]) / 0.03) ** 2)
    pdf = BinnedPDF(edges, mass / mass.sum(1, keepdims=True))
    z = np.clip(rng.normal(center, 0.06), 0, 1.59)

    chain = calibrate.fit(pdf[:300], z[:300], ("temperature", "pit"))
    assert_type(chain, Chain)
    held_out = {"raw": pdf[300:], "mended": chain(pdf[300:])}
    assert_type(held_out, dict[str, BinnedPDF])
    report = evaluate(held_out, z[300:], resamples=20)
    assert_type(report, Evaluation)
    report.save(out / "photoz")
    survey = SURVEYS["ps1"]
    assert_type(survey, Survey)
    numbers: dict[str, Any] = metrics.point_metrics(pdf.mean(), z, thresholds=(0.05,))
    return {"nmad": float(numbers["nmad"]), "raw": report.density["raw"]["pit_ks"],
            "mended": report.density["mended"]["pit_ks"], "field": survey.field_arcsec}  # fmt: skip


def refusals() -> dict[str, str]:
    """What is wrong is said in one sentence, by an error that can be caught by its kind."""
    short, long, wrong = torch.zeros(1, 5), torch.zeros(1, 6), torch.full((1, 5), torch.nan)
    attempts: dict[str, tuple[type[FusionError], Callable[[], object]]] = {
        "one model": (InputError, lambda: fuse([network(4)])),
        "no spec": (ot_fusion.SpecError, lambda: fuse([nn.Bilinear(2, 2, 2), nn.Bilinear(2, 2, 2)])),
        "vocabulary": (VocabularyMismatchError, lambda: fuse_logits(short, long, [short])),
        "not finite": (NonFiniteLogitsError, lambda: fuse_logits(wrong, short, [short], validate="eager")),
        "setting": (ConfigError, lambda: FusionConfig(alpha_range=(1.0, 0.5))),
        "masses": (InputError, lambda: BinnedPDF(np.array([0.0, 1.0]), np.array([[0.2]]))),
    }
    found: dict[str, str] = {}
    for name, (kind, attempt) in attempts.items():
        try:
            attempt()
        except kind as error:
            found[name] = str(error)
    return found


def main() -> None:
    """Do all of it below the directory that was named, and print the numbers."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    print(f"mantis-photoz {mantis_photoz.__version__}, ot-fusion {ot_fusion.__version__}")
    done = {"join": join(out), "steer": steer(out), "mend": mend(out), "refusals": refusals()}
    (out / "numbers.json").write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main()
