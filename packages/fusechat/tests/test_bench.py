"""The benchmark measures what it says, on a small case."""

from __future__ import annotations

import pytest
import torch

from fusechat import FusionBatch, FusionLoss, Targets
from fusechat.bench import alignment_rows, loss_rows, run
from fusechat.plain import plain_loss
from fusion_core.errors import ConfigError


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
