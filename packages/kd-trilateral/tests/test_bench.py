"""The benchmark's parts, at the smallest size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fusion_core.errors import ConfigError
from kd_trilateral import bench

SMALL = bench.Case("small", lambda: nn.Linear(5, bench.CLASSES), (5,), 8)


def test_resnet20_has_the_published_size() -> None:
    assert sum(p.numel() for p in bench.ResNet20(10).parameters()) == pytest.approx(0.27e6, rel=0.01)


def test_both_sides_take_the_same_steps_at_a_constant_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []
    parts = bench._parts

    def keep(case: bench.Case, device: str) -> bench._Parts:
        found = parts(case, device)
        made.append(found.student)
        return found

    monkeypatch.setattr(bench, "_parts", keep)
    bench.plain(SMALL, 1)()
    bench.bilevel(SMALL, bench.Setting("frozen", 0))()
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_live_peak_counts_tensors_alive_at_once() -> None:
    def make() -> Callable[[], None]:
        kept = torch.zeros(1 << 20)  # 4 MiB, alive throughout

        def cycle() -> None:
            a = kept + 1.0
            del a
            _ = kept + 2.0

        return cycle

    assert 8 * 2**20 <= bench.live_peak(make) < 9 * 2**20


def test_rows_have_ratios_and_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CASES", {"resnet": SMALL})
    table = bench.run("resnet", "fd1,head", repeats=1)
    rows = {row.name: row for row in table.rows}
    assert rows["small fd1 every=1 against unrolled"].target == ">= 1.82"
    assert rows["small fd1 every=4 subsample=0.5 held-out batch B*0.5"].met is not None
    assert rows["small head every=1"].target is None
    memory = rows["small fd1 every=1 peak memory"]
    assert memory.ours_peak_bytes is not None
    assert memory.ours_peak_bytes > 0
    table.save(tmp_path / "bench.json")
    assert (tmp_path / "bench.json").is_file()


@pytest.mark.parametrize(("student", "engines"), [("vgg", None), ("mlp", "magic")])
def test_unknown_choices(student: str, engines: str | None) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        bench.run(student, engines)
