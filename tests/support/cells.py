"""Cells of measurements on the tiny pipelines."""

from __future__ import annotations

from cachekit.tools.bench.cells import Cell, Method


def cell(specs: tuple[str, ...], steps: int = 6, seed: int = 5, scheduler: str = "DPMSolverMultistepScheduler") -> Cell:
    """Make the cell of a contender with these specs, beside 6 uncached steps."""
    shared = {"model": "tiny", "model_hash": "", "captions": "", "metrics": (), "environment": "", "uncached_steps": 6}
    none = dict.fromkeys(("dtype", "device", "compiled", "height", "width", "guidance"))
    method = Method.CACHEKIT if specs else Method.PLAIN
    return Cell(method=method, specs=specs, steps=steps, scheduler=scheduler, seed=seed, **shared, **none)
