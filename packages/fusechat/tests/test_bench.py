"""The benchmark measures what it says, on a small case."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from fusechat import FusionBatch, FusionLoss, Targets
from fusechat.bench import alignment_rows, loss_rows, run
from fusechat.bench_merging import measure
from fusechat.plain import plain_loss
from fusion_core.errors import ConfigError, FusionError


@pytest.mark.slow
def test_alignment_rows():
    rows = alignment_rows(64, 1)
    assert [row.name for row in rows] == ["span alignment", "exact DTW", "exact DTW without numba"]
    assert all("path identical" in row.note and row.ratio > 0 for row in rows)


@pytest.mark.slow
def test_loss_adds_little_beyond_the_gradient():
    peak, _ = loss_rows(2, 256, 16_000, 10)
    gradient = 2 * 256 * 16_000 * 4
    assert peak.ours_peak_bytes < 1.8 * gradient + 2**24  # the gradient, and one slice that is widened
    assert peak.reference_peak_bytes > 2.5 * gradient


def test_plain_loss_is_the_same_objective():
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 9, generator=made, dtype=torch.float64)
    labels = torch.randint(0, 9, (2, 6), generator=made).index_fill_(1, torch.tensor([1]), -100)
    values = torch.randn(2, 6, 3, generator=made, dtype=torch.float64)
    ids = torch.randint(0, 9, (2, 6, 3), generator=made)
    batch = FusionBatch(
        {}, labels, (Targets(ids, values, torch.ones(2, 6, dtype=torch.bool), torch.zeros(2)),)
    )
    ours = FusionLoss(0.1, select="source")(logits, batch).total
    torch.testing.assert_close(ours, plain_loss(logits, labels, ids, values.softmax(-1), 0.9))


def test_run_refuses():
    with pytest.raises(ConfigError, match="tokens is 3"):
        run(tokens=3)


@pytest.mark.skipif(not hasattr(os, "posix_spawn"), reason="processes are measured on POSIX systems")
def test_a_process_is_measured_without_the_one_that_started_it():
    torch.ones(50_000_000)  # 200 MB: this process has had far more than the small one will
    work = "import sys, time; sum(range(3_000_000)); time.sleep(0.2); print('x'); sys.exit({})"
    cost = measure([sys.executable, "-S", "-c", work.format(0)])
    assert 2**20 < cost.peak < 60 * 2**20
    assert 0 < cost.cpu < cost.wall
    with pytest.raises(FusionError, match="failed: no such thing"):
        measure([sys.executable, "-S", "-c", "import sys; sys.exit('no such thing')"])
