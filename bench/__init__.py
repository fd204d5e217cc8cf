"""Measurements: scripts to run from a checkout, with the package installed."""
