"""Helpers for the test suites of the fusion packages."""
