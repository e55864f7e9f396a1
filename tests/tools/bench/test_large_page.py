"""A page of 20 specs, 3 schedulers and 24 captions can be sent around: it stays below 15 MB."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cachekit.tools.bench import workbench
from cachekit.tools.bench.cells import Method
from cachekit.tools.bench.page import write_page
from cachekit.tools.bench.results import read
from cachekit.tools.bench.summary import groups

SPECS, SCHEDULERS, CAPTIONS = 20, 3, 24
#: A grid that was measured on the embedded model: 14 compositions, 3 schedulers, 12 captions.
MEASURED = Path(__file__).parents[3] / "benchmarks" / "results" / "demo.jsonl"


def picture(seed, side=256):
    """Noise with the spectrum of photographs (1/f), as a result holds the pictures of large models."""
    random, waves = np.random.default_rng(seed), np.fft.fftfreq(side)
    falling = 1 / np.maximum(np.hypot(waves[:, None], waves), 1 / side)
    light, *tints = (np.fft.ifft2(np.fft.fft2(random.standard_normal((side, side))) * falling).real for _ in range(4))
    colours = np.stack([light / light.std() + tint / tint.std() / 3 for tint in tints], axis=-1)
    return workbench._data_uri(Image.fromarray((128 + 50 * colours).clip(0, 255).astype("uint8")))


def enlarged(result, number, images):
    """The result with more captions, pictures of 256 pixels, and a plan with as many lines as one of SDXL."""
    cell = result.cell
    if cell.method is Method.CACHEKIT:
        cell = cell.model_copy(update={"specs": (*cell.specs, f"text_kv:number={number}")})
    columns = (result.plan or {}).get("columns", ())
    longer = [(spec, f"{name}.{part}", *rest) for part in range(12) for spec, name, *rest in columns]
    changed = {
        "cell": cell,
        "id": cell.id,
        "samples": [*islice(cycle(result.samples), CAPTIONS)],
        "plan": result.plan and {**result.plan, "columns": longer},
        "pictures": [(caption, *images) for caption, _, _ in result.pictures],
    }
    return result.model_copy(update=changed)


@pytest.fixture(scope="module")
def measured():
    return read(MEASURED)[0]


def test_a_page_of_a_large_grid_stays_small(measured, tmp_path):
    of_scheduler = defaultdict(list)
    for result in measured:
        of_scheduler[result.cell.scheduler, result.cell.method is Method.CACHEKIT].append(result)
    images = picture(0), picture(1)
    large = [
        enlarged(result, number, images)
        for (_, is_cached), found in of_scheduler.items()
        for number, result in enumerate(islice(cycle(found), SPECS) if is_cached else found)
    ]
    listed = groups(large)
    assert len(listed) == SCHEDULERS
    for group in listed:
        assert sum(row.cell.method is Method.CACHEKIT for row in group.rows) == SPECS
        assert {len(row.samples) for row in group.rows} == {CAPTIONS}
    write_page(listed, tmp_path / "large.html")
    text = (tmp_path / "large.html").read_text()
    assert len(text) < 15e6
    room = int(re.search(r"The page has room for (\d) of each configuration", text)[1])
    assert 1 <= room < 4
    assert text.count(f'<img src="{images[0]}"') > room * SPECS * SCHEDULERS


def test_small_pictures_are_all_there(measured, tmp_path):
    write_page(groups(measured), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "The page has room for" not in text
    (first, *_) = (result for result in measured if result.cell.method is Method.CACHEKIT)
    assert len(first.pictures) == 4
    assert all(cached in text for _, cached, _ in first.pictures)
