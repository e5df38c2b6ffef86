"""``BinnedPDF``: redshift densities of many objects on shared bins, with all that is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fusion_core.errors import check_range
from mantis_photoz import density, points
from mantis_photoz.arrays import Array, as_tensor, to_numpy, wide
from mantis_photoz.errors import ConfigError, DensityError, ShapeError
from mantis_photoz.grid import bin_edges, grid_nodes, training_edges

__all__ = ["LEVELS", "BinnedPDF"]

LEVELS = (0.025, 0.16, 0.5, 0.84, 0.975)
"""The quantiles that catalogues get: 2.5, 16, 50, 84 and 97.5 %."""

_SUM_TOLERANCE = 1e-2  # masses that were stored as float16


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BinnedPDF:
    """Densities that are constant within bins; the CDF is linear there, and everything comes from it.

    Args:
        edges: (bins + 1,) increasing redshifts.
        pmf: (batch, bins) masses >= 0 that sum to 1; they are divided by their sum in float64.
        nodes: (bins,) redshifts that the classes stand for; the middles of the bins by default. (The first
            node of the training grid is 0, the middle of its bin is w/4.)

    Arrays give arrays, tensors give tensors; masses that are tensors keep their gradient.

    Raises:
        DensityError: edges that do not increase, negative, non-finite or all-zero masses, a sum far from 1.
        ShapeError: numbers of edges, masses and nodes that do not fit.

    Example:
        >>> import numpy as np
        >>> pdf = BinnedPDF(np.array([0.0, 0.5, 1.0]), np.array([[0.25, 0.75]]))
        >>> pdf.mean(), pdf.median().round(4), pdf.cdf(np.array([0.5]))
        (array([0.625]), array([0.6667]), array([0.25]))
    """

    edges: Any
    pmf: Any
    nodes: Any = None

    def __post_init__(self) -> None:
        arrays = not any(isinstance(part, Tensor) for part in (self.edges, self.pmf, self.nodes))
        masses = as_tensor(self.pmf, "pmf")
        edges = wide(as_tensor(self.edges, "edges")).to(masses.device)
        masses = wide(masses)
        if masses.ndim != 2 or edges.ndim != 1 or masses.shape[1] + 1 != len(edges):
            raise ShapeError(
                f"pmf has shape {tuple(masses.shape)} and edges {tuple(edges.shape)}, "
                "wanted (batch, bins) and (bins + 1,)"
            )
        if not bool((edges.diff() > 0).all() & torch.isfinite(edges).all()):
            raise DensityError("edges do not increase, wanted finite redshifts in increasing order")
        total = masses.sum(-1, keepdim=True)
        right = torch.isfinite(masses).all(-1) & (masses >= 0).all(-1)
        right &= (total[:, 0] - 1).abs() <= _SUM_TOLERANCE
        if not bool(right.all()):
            row = int((~right).nonzero()[0, 0])
            raise DensityError(
                f"pmf has {int((~right).sum())} rows that are no density, the first is row {row} with sum "
                f"{float(total[row, 0]):.6g}; wanted finite masses >= 0 that sum to 1 (logits: from_logits)"
            )
        masses = masses / total
        nodes = points.midpoints(edges) if self.nodes is None else wide(as_tensor(self.nodes, "nodes"))
        nodes = nodes.to(masses.device)
        if nodes.shape != (masses.shape[1],):
            raise ShapeError(f"nodes have shape {tuple(nodes.shape)}, wanted ({masses.shape[1]},)")
        for name, value in (("edges", edges), ("pmf", masses), ("nodes", nodes)):
            object.__setattr__(self, name, to_numpy(value) if arrays else value)

    # ---- making ------------------------------------------------------------------------------------------

    @classmethod
    def from_logits(
        cls, logits: Array, *, z_max: float = 1.6, edges: Any = None, nodes: Any = None
    ) -> BinnedPDF:
        """Softmax of a classifier's outputs on the training grid, or on ``edges``.

        Args:
            logits: (batch, bins); a row with a non-finite logit becomes the uniform density.
            z_max: of the training grid.
            edges: (bins + 1,) other bins.
            nodes: (bins,) of those.
        """
        values = as_tensor(logits, "logits")
        if values.ndim != 2:
            raise ShapeError(f"logits have shape {tuple(values.shape)}, wanted (batch, bins)")
        bins = values.shape[1]
        if edges is None:
            edges = training_edges(bins, z_max).to(values.device)
            nodes = grid_nodes(bins, z_max).to(values.device) if nodes is None else nodes
        limits = as_tensor(edges, "edges")
        if limits.shape != (bins + 1,):
            raise ShapeError(
                f"edges have shape {tuple(limits.shape)}, wanted ({bins + 1},) for {bins} logits"
            )
        pmf, _ = density.pmf_from_logits(values, limits.diff())
        made = cls(limits, pmf, None if nodes is None else as_tensor(nodes, "nodes"))
        return made if isinstance(logits, Tensor) else made.numpy()

    @classmethod
    def from_nodes(cls, nodes: Array, pmf: Array) -> BinnedPDF:
        """Masses at nodes; the edges lie halfway between them."""
        return cls(bin_edges(nodes), pmf, nodes)

    @classmethod
    def from_qp(cls, ensemble: Any, edges: Any = None) -> BinnedPDF:
        """From a ``qp.Ensemble`` (extra ``qp``): a histogram keeps its bins, others go on ``edges``."""
        from mantis_photoz import qpio

        return qpio.from_qp(ensemble, edges)

    def to_qp(self, kind: Literal["hist", "interp", "quant"] = "hist", ancil: Any = None) -> Any:
        """As a ``qp.Ensemble`` (extra ``qp``)."""
        from mantis_photoz import qpio

        return qpio.to_qp(self, kind, ancil)

    @classmethod
    def concatenate(cls, parts: Sequence[BinnedPDF]) -> BinnedPDF:
        """One set of densities after the other, all on the same bins.

        Raises:
            DensityError: none, or other edges.
        """
        if not parts:
            raise DensityError("parts is empty, wanted at least one set of densities")
        first = parts[0].torch()
        others = [part.torch() for part in parts]
        for part in others:
            if part.edges.shape != first.edges.shape or not torch.allclose(part.edges, first.edges):
                raise DensityError("parts have different edges, wanted the same (use rebin)")
        joined = cls(first.edges, torch.cat([part.pmf for part in others]), first.nodes)
        return joined if parts[0].is_torch else joined.numpy()

    # ---- the container -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self.pmf.shape[0])

    def __repr__(self) -> str:
        low, high = float(self.edges[0]), float(self.edges[-1])
        return f"BinnedPDF({len(self)} objects, {self.bins} bins on [{low:g}, {high:g}])"

    def __getitem__(self, rows: Any) -> BinnedPDF:
        """Some of the objects; an integer gives a set of one."""
        if isinstance(rows, int):
            rows = [rows]
        return BinnedPDF(self.edges, self.pmf[rows], self.nodes)

    @property
    def bins(self) -> int:
        """How many bins there are."""
        return int(self.pmf.shape[1])

    @property
    def widths(self) -> Any:
        """(bins,) widths."""
        return self.edges[1:] - self.edges[:-1]

    @property
    def midpoints(self) -> Any:
        """(bins,) middles."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    @property
    def density(self) -> Any:
        """(batch, bins) values of the density, ``p_k / w_k``."""
        return self.pmf / self.widths

    @property
    def is_torch(self) -> bool:
        """Whether the parts are tensors."""
        return isinstance(self.pmf, Tensor)

    def numpy(self) -> BinnedPDF:
        """The same as arrays, without gradients."""
        return BinnedPDF(*(to_numpy(part) for part in (self.edges, self.pmf, self.nodes)))

    def torch(self, device: Any = None) -> BinnedPDF:
        """The same as tensors."""
        parts = (as_tensor(part) for part in (self.edges, self.pmf, self.nodes))
        return BinnedPDF(*(part if device is None else part.to(device) for part in parts))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return as_tensor(self.edges), as_tensor(self.pmf), as_tensor(self.nodes)

    def _call(self, function: Callable[[Tensor, Tensor], Any]) -> Any:
        edges, pmf, _ = self._parts()
        found = function(edges, pmf)
        return found if self.is_torch else to_numpy(found)

    def _redshifts(self, z: Any, name: str = "z") -> Tensor:
        value = as_tensor(z, name)
        value = wide(value).to(as_tensor(self.pmf).device)
        if value.ndim == 0:
            value = value.expand(len(self))
        if value.ndim > 2 or value.shape[0] != len(self):
            raise ShapeError(
                f"{name} has shape {tuple(value.shape)}, wanted ({len(self)},) or ({len(self)}, n): "
                "one or more redshifts per object"
            )
        return value

    def _truth(self, z: Any) -> Tensor:
        value = self._redshifts(z, "z_true")
        if value.ndim != 1 or not bool(torch.isfinite(value).all()):
            raise DensityError(
                f"z_true has shape {tuple(value.shape)} and {int((~torch.isfinite(value)).sum())} non-finite "
                f"values, wanted ({len(self)},) finite redshifts"
            )
        return value

    # ---- probabilities -----------------------------------------------------------------------------------

    def cdf(self, z: Array | float) -> Any:
        """Cumulative probability at a redshift for all, one per object (batch,), or several (batch, n)."""
        return self._call(lambda edges, pmf: density.cdf(edges, pmf, self._redshifts(z)))

    def pdf(self, z: Array | float) -> Any:
        """Density at redshifts; 0 outside the support. Shapes as :meth:`cdf`."""
        return self._call(lambda edges, pmf: density.density_at(edges, pmf, self._redshifts(z)))

    def ppf(self, levels: Array | Sequence[float] | float) -> Any:
        """Quantiles: (batch,) of one level, (batch, levels) of several that all objects share.

        Raises:
            ConfigError: a level outside [0, 1].
        """
        wanted = wide(as_tensor(levels, "levels"))
        if wanted.ndim > 1 or not bool(((wanted >= 0) & (wanted <= 1)).all()):
            raise ConfigError(f"levels are {levels!r}, wanted numbers in [0, 1]")
        flat = wanted.reshape(-1)
        found = self._call(lambda edges, pmf: density.ppf(edges, pmf, flat.to(pmf.device)))
        return found[:, 0] if wanted.ndim == 0 else found

    def quantiles(self, levels: Sequence[float] = LEVELS) -> Any:
        """(batch, levels) quantiles, those of catalogues by default."""
        return self.ppf(levels)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Any:
        """(batch, n) redshifts drawn from the densities."""
        check_range("n", n, 1, 10**9)

        def drawn(edges: Tensor, pmf: Tensor) -> Tensor:
            u = torch.rand(len(self), n, dtype=pmf.dtype, generator=generator).to(pmf.device)
            return density.ppf(edges, pmf, u)

        return self._call(drawn)

    # ---- point estimates ---------------------------------------------------------------------------------

    def mean(self, *, official: bool = False) -> Any:
        """(batch,) mean over the middles of the bins; over the nodes with ``official``."""
        nodes = as_tensor(self.nodes)
        return self._call(lambda e, p: points.mean(nodes if official else points.midpoints(e), p))

    def std(self, *, official: bool = False) -> Any:
        """(batch,) standard deviation, with the width of the bins; masses at the nodes with ``official``."""
        nodes = as_tensor(self.nodes) if official else None
        return self._call(lambda e, p: points.variance(e, p, nodes).sqrt())

    def mode(self, *, official: bool = False) -> Any:
        """(batch,) node of the largest density; of the largest mass with ``official``; first on ties."""
        nodes = as_tensor(self.nodes)
        return self._call(lambda e, p: points.mode(nodes, p if official else p / e.diff()))

    def median(self) -> Any:
        """(batch,) where the CDF is 0.5."""
        return self.ppf(0.5)

    def best(self, width: float = 0.15) -> Any:
        """(batch,) node of least expected Lorentzian loss (Tanaka et al. 2018)."""
        nodes = as_tensor(self.nodes)
        return self._call(lambda e, p: points.lorentzian_best(nodes, points.midpoints(e), p, width))

    def odds(self, width: float = 0.06, *, official: bool = False) -> Any:
        """(batch,) mass within ``width (1 + z)`` of the mode."""
        center = as_tensor(self.mode(official=official))
        return self._call(lambda e, p: points.odds(e, p, center, width))

    def outlier_probability(self, width: float = 0.15) -> Any:
        """(batch,) mass further than ``width (1 + z)`` from the median."""
        center = as_tensor(self.median())
        return self._call(lambda e, p: points.outlier_probability(e, p, center, width))

    def peaks(self, floor: float = 0.1, least: float = 0.05) -> Any:
        """(batch,) number of runs above ``floor`` of the highest density that hold more than ``least``."""
        return self._call(lambda e, p: points.peaks(e, p, floor, least))

    def entropy(self) -> Any:
        """(batch,) entropy of the masses, nats."""
        return self._call(lambda _, p: points.entropy(p))

    def hpd(self, level: float = 0.68) -> Any:
        """(batch, 2) ends of the shortest interval of this mass."""
        check_range("level", level, 0.0, 1.0, open=True)
        return self._call(lambda e, p: torch.stack(density.hpd_interval(e, p, level), -1))

    def summaries(self, *, official: bool = False) -> dict[str, Any]:
        """All columns of an output table, (batch,) each, by name."""
        quantiles = self.quantiles()
        return {
            "z_mean": self.mean(official=official),
            "z_mode": self.mode(official=official),
            "z_median": quantiles[:, 2],
            "z_best": self.best(),
            "z_q025": quantiles[:, 0],
            "z_q16": quantiles[:, 1],
            "z_q84": quantiles[:, 3],
            "z_q975": quantiles[:, 4],
            "z_std": self.std(official=official),
            "odds": self.odds(official=official),
            "n_peaks": self.peaks(),
            "entropy": self.entropy(),
            "p_outlier": self.outlier_probability(),
        }

    # ---- against the truth -------------------------------------------------------------------------------

    def pit(self, z_true: Array) -> Any:
        """(batch,) probability integral transform ``CDF(z_true)``; 0 or 1 outside the support."""
        return self.cdf(self._truth(z_true))

    def crps(self, z_true: Array) -> Any:
        """(batch,) continuous ranked probability score, closed form."""
        return self._call(lambda e, p: density.crps(e, p, self._truth(z_true)))

    def cde_loss(self, z_true: Array) -> Any:
        """(batch,) conditional density loss, bin-exact."""
        return self._call(lambda e, p: density.cde_loss(e, p, self._truth(z_true)))

    def hpd_level(self, z_true: Array) -> Any:
        """(batch,) mass of the smallest highest-density region that holds the truth."""
        return self._call(lambda e, p: density.hpd_level(e, p, self._truth(z_true)))

    def log_density(self, z_true: Array) -> Any:
        """(batch,) log-density of the truth's bin."""
        return self._call(lambda e, p: density.log_density(e, p, self._truth(z_true)))

    # ---- other densities ---------------------------------------------------------------------------------

    def reweight(self, target: Array, train: Array) -> BinnedPDF:
        """Exchange the prior: ``p_k target_k / train_k``, normalised (:mod:`mantis_photoz.prior`)."""
        from mantis_photoz import prior

        return prior.reweight(self, target, train)

    def rebin(self, edges: Array) -> BinnedPDF:
        """The same mass in other bins; they have to cover the support.

        Raises:
            DensityError: the new bins lose mass, or do not increase.
        """
        new = wide(as_tensor(edges, "edges"))
        old, pmf, _ = self._parts()
        if new.ndim != 1 or len(new) < 2 or bool(new[0] > old[0] + 1e-12) or bool(new[-1] < old[-1] - 1e-12):
            raise DensityError(
                f"edges span [{float(new.min()):g}, {float(new.max()):g}], wanted two or more that cover "
                f"[{float(old[0]):g}, {float(old[-1]):g}]"
            )
        made = density.rebin(old, pmf, new.to(old.device)).clamp(min=0.0)
        return BinnedPDF(new if self.is_torch else to_numpy(new), made if self.is_torch else to_numpy(made))

    def mix(self, others: Sequence[BinnedPDF]) -> BinnedPDF:
        """The mean of this and other sets of densities of the same objects (views of one galaxy)."""
        masses = self.pmf
        for other in others:
            masses = masses + other.pmf
        return BinnedPDF(self.edges, masses / (1 + len(others)), self.nodes)

    def stack(self, weights: Array | None = None) -> BinnedPDF:
        """The n(z) of the sample: the (weighted) mean of the densities, as a set of one.

        Raises:
            DensityError: no objects, or weights that are negative or all zero.
        """
        edges, pmf, nodes = self._parts()
        if not len(self):
            raise DensityError("there are no densities to stack")
        w = torch.ones(len(self)) if weights is None else as_tensor(weights, "weights")
        w = w.to(pmf)
        if w.shape != (len(self),) or bool((w < 0).any()) or not bool(w.sum() > 0):
            raise DensityError(f"weights have shape {tuple(w.shape)}, wanted ({len(self)},) numbers >= 0")
        made = BinnedPDF(edges, (w / w.sum() @ pmf)[None], nodes)
        return made if self.is_torch else made.numpy()
