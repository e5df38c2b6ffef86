"""Mantis Shrimp: calibrated redshift densities of galaxies from the images of several surveys."""

__version__ = "0.1.0"
