"""The benchmark measures what it says, on a small case."""

from __future__ import annotations

import pytest
import torch

from fusion_core.device import threads
from fusion_core.errors import ConfigError
from logit_fusion import fuse_logits
from logit_fusion.bench import draw, generation_rows, run, solver_rows
from logit_fusion.plain import plain_grid


@pytest.mark.parametrize("count", [1, 2])
def test_solver_rows(count):
    with threads(count):
        rows = solver_rows(((700, 8),), repeats=1)
        assert torch.get_num_threads() == count
    wanted = ["grid", "exact", "exact", "newton", "exact"]
    assert [row.name.split()[0] for row in rows] == wanted + ["grid"] * (count > 1)
    assert [row.threads for row in rows] == [1] * 5 + [2] * (count > 1)
    assert (rows[0].target, rows[-1].target) == (">= 3", None)
    assert all(row.ours_s > 0 for row in rows)


def test_generation_rows_compare_equal_tokens():
    """A plain loop of three passes and the literal grid says what the fused model says."""
    rows = generation_rows(32, 1, 97, 2, tokens=3, repeats=1)
    assert [row.reference.split()[0] for row in rows] == ["members", "members", "proxy-tuning"]


def test_plain_grid_is_the_papers():
    logits = draw(50, 6, torch.device("cpu"))
    alpha, log_probs = plain_grid(*logits)
    step = fuse_logits(logits[0], logits[1], logits[2:], strategy="single", solver="grid")
    torch.testing.assert_close(step.alpha.squeeze(-1), alpha)
    torch.testing.assert_close(step.log_probs, log_probs, rtol=0, atol=1e-5)


def test_run_refuses():
    with pytest.raises(ConfigError, match="repeats is 0"):
        run(repeats=0)
