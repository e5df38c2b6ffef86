"""The references of the benchmark compute the same, and a run makes rows with targets."""

from __future__ import annotations

import pytest
import torch

from fusion_core.errors import ConfigError
from mantis_photoz import bench, density
from mantis_photoz.calpit import MonotoneNetwork


def test_references_are_right():
    torch.manual_seed(0)
    network = MonotoneNetwork(4, (16, 16))
    alpha, x = torch.rand(1, 30), torch.randn(1, 4)
    with torch.no_grad():
        wanted = bench.repeated_quadrature(network, alpha, x)
        torch.testing.assert_close(network.exact(alpha, x), wanted, atol=1e-6, rtol=0)
        torch.testing.assert_close(network(alpha, x, 256), wanted, atol=1e-5, rtol=0)
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    pmf, z = torch.rand(3, 10, dtype=torch.float64).softmax(-1), torch.tensor([0.1, 0.52, 0.9]).double()
    exact = density.crps(edges, pmf, z)
    torch.testing.assert_close(
        torch.tensor(bench.loop_crps(edges, pmf, z)).double(), exact, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(bench.quadrature_crps(edges, pmf, z, 2000), exact, atol=1e-4, rtol=0)


def test_a_run_makes_rows(tmp_path):
    found = bench.run(repeats=1, only=("crps",))
    assert [row.name for row in found.rows] == ["crps, 8 objects", "crps, 2000 objects"]
    assert found.rows[0].target == ">= 10"
    found.save(tmp_path / "bench.json")
    assert (tmp_path / "bench.json").stat().st_size > 0
    assert {"cal-pit", "crps", "fits", "sky", "simulate"} <= set(bench.rows())
    with pytest.raises(ConfigError, match="wanted words of cal-pit, crps"):
        bench.run(only=("nothing",))
