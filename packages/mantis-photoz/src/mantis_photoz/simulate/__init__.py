"""Simulated multi-survey galaxies with known redshifts (section 6.1): a test bench, no data."""

from mantis_photoz.simulate.population import SimulationConfig
from mantis_photoz.simulate.survey import model_inputs, simulate, write

__all__ = ["SimulationConfig", "model_inputs", "simulate", "write"]
