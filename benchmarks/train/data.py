"""Render the training set once, into a memory-mapped file."""

from __future__ import annotations

import json
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from cachekit.models.demo import scenes

CHUNK = 2000


def render_chunk(seed: int) -> tuple[list[str], NDArray[np.uint8]]:
    """Render CHUNK training scenes: their captions, and CHUNK x 64 x 64 x 3 bytes."""
    rng = np.random.default_rng([20, seed])
    source = scenes.scenes(rng, heldout=False)
    chosen = [next(source) for _ in range(CHUNK)]
    images = scenes.render_batch(chosen, rng)
    return [scenes.caption(scene) for scene in chosen], (images * 255 + 0.5).astype(np.uint8)


def render_all(work: Path, count: int, processes: int) -> None:
    """Render `count` scenes to images.npy and captions.json."""
    size = scenes.IMAGE_SIZE
    images = open_memmap(work / "images.npy", "w+", np.uint8, (count, size, size, 3))
    captions: list[str] = []
    with Pool(processes) as pool:
        for texts, rendered in pool.imap(render_chunk, range(count // CHUNK)):
            images[len(captions) : len(captions) + CHUNK] = rendered
            captions += texts
    images.flush()
    (work / "captions.json").write_text(json.dumps(captions))


def load_images(work: Path) -> NDArray[np.uint8]:
    """Memory-map the rendered images: n x 64 x 64 x 3 bytes."""
    images: NDArray[np.uint8] = np.load(work / "images.npy", mmap_mode="r")
    return images


def load_captions(work: Path) -> list[str]:
    """Load the captions of the rendered images."""
    captions: Any = json.loads((work / "captions.json").read_text())
    return list(captions)
