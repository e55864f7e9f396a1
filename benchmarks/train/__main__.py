"""Train the embedded UNet from scratch: `python -m benchmarks.train --work DIR`.

The same command resumes: stages that DIR has already are skipped, and an interrupted UNet continues from its last
snapshot. Two processes with one thread each take about an hour and a half on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffusers import AutoencoderTiny

from cachekit.models.demo.pipeline import WEIGHTS

from . import autoencoder, data, export, text, unet

IMAGES = 100_000
AUTOENCODER_ROUNDS = ((480.0, 2.5e-3), (330.0, 1.5e-3))
TEXT_SECONDS = 75.0
UNET_SECONDS = 4360.0


def _train_autoencoder(work: Path, processes: int, scale: float) -> None:
    for seconds, rate in AUTOENCODER_ROUNDS:
        autoencoder.train(work, seconds * scale, rate, processes)
    found = autoencoder.reconstruction(AutoencoderTiny.from_pretrained(work / "autoencoder"))
    (work / "autoencoder.json").write_text(json.dumps(found))
    print(f"autoencoder: {found}", flush=True)


def run(work: Path, target: Path, processes: int, scale: float) -> None:
    """Run every stage that isn't done yet, and export the model to `target`."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "captions.json").exists():
        data.render_all(work, IMAGES, processes)
    if not (work / "text.json").exists():
        text.pretrain(work, TEXT_SECONDS * scale)
    if not (work / "autoencoder.json").exists():
        _train_autoencoder(work, processes, scale)
    if not (work / "encoded.json").exists():
        autoencoder.encode_all(work, processes)
        (work / "encoded.json").write_text("true")
    unet.train(work, UNET_SECONDS * scale, processes)
    export.export(work, target)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and snapshots (about 2 GB)")
    parser.add_argument("--target", type=Path, default=WEIGHTS / "unet", help="folder of the finished model")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every training time")
    options = parser.parse_args()
    run(options.work, options.target, options.processes, options.scale)


if __name__ == "__main__":
    main()
