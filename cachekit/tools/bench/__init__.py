"""Measure grids of policies against the plain pipeline, fewer steps and the published packages."""
