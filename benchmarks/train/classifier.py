"""Train the classifier whose features the Frechet distance compares: `python -m benchmarks.train.classifier`.

Scenes are rendered on the fly, so it needs no data; a few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from cachekit.models.demo import scenes
from cachekit.models.demo.classifier import ASPECTS, Classifier
from cachekit.models.demo.pipeline import FIGURES, WEIGHTS, write_manifest

STEPS, BATCH, RATE = 2000, 64, 3e-3
MEASURED = 2000
ABSENT = -100
_WORDS: dict[str, tuple[str, ...]] = {
    "size": tuple(scenes.SIZES),
    "fill": scenes.FILLS,
    "colour": tuple(scenes.COLOURS),
    "shape": scenes.SHAPES,
}


def to_tensor(images: scenes.Array) -> Tensor:
    """Convert n x 64 x 64 x 3 to n x 3 x 64 x 64."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def labels(chosen: list[scenes.Scene]) -> dict[str, Tensor]:
    """Convert scenes to class labels of each aspect, n x 2 x 2 by quarter; ABSENT where a quarter is empty."""
    found = {name: torch.full((len(chosen), 2, 2), ABSENT) for name in ASPECTS}
    found["present"][:] = 0
    for index, scene in enumerate(chosen):
        found["background"][index] = tuple(scenes.BACKGROUNDS).index(scene.background)
        for thing in scene.things:
            place = (index, *divmod(scenes.PLACES.index(thing.place), 2))
            found["present"][place] = 1
            for name, words in _WORDS.items():
                found[name][place] = words.index(getattr(thing, name))
    return found


def train(steps: int) -> Classifier:
    """Train a classifier on scenes that are rendered on the fly."""
    torch.manual_seed(4)
    rng = np.random.default_rng(4)
    source = scenes.scenes(rng, heldout=False)
    classifier = Classifier()
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.05)
    for step in range(1, steps + 1):
        chosen = [next(source) for _ in range(BATCH)]
        scores, wanted = classifier(to_tensor(scenes.render_batch(chosen, rng))), labels(chosen)
        losses = [functional.cross_entropy(scores[name], wanted[name], ignore_index=ABSENT) for name in ASPECTS]
        optimiser.zero_grad()
        torch.autograd.backward(torch.stack(losses).sum())
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            summary = " ".join(f"{name} {loss.item():.3f}" for name, loss in zip(ASPECTS, losses))
            print(f"classifier step {step}: {summary}", flush=True)
    return classifier.eval().requires_grad_(False)


def heldout(count: int, seed: int) -> tuple[list[scenes.Scene], Tensor]:
    """Sample held-out scenes, and render them."""
    chosen = [scenes.parse(text) for text in scenes.heldout_captions(count, seed)]
    return chosen, to_tensor(scenes.render_batch(chosen, np.random.default_rng(seed)))


def normalise(classifier: Classifier) -> None:
    """Scale the features to zero mean and unit variance over scenes, and the head to undo that."""
    last, head = classifier.trunk[-1], classifier.head
    assert isinstance(last, torch.nn.Conv2d)
    assert last.bias is not None
    assert head.bias is not None
    found = classifier.quarters(heldout(MEASURED, seed=6)[1]).mean((2, 3))
    mean, std = found.mean(0), found.std(0)
    head.bias += head.weight[:, :, 0, 0] @ mean
    head.weight *= std[:, None, None]
    last.bias.sub_(mean).div_(std)
    last.weight /= std[:, None, None, None]


def accuracies(classifier: Classifier) -> dict[str, float]:
    """Measure the accuracy of each aspect over the quarters of held-out scenes."""
    chosen, images = heldout(MEASURED, seed=7)
    scores, wanted = classifier(images), labels(chosen)
    judged = {name: wanted[name] != ABSENT for name in ASPECTS}
    right = {name: (scores[name].argmax(1) == wanted[name])[judged[name]] for name in ASPECTS}
    return {name: float(right[name].float().mean()) for name in ASPECTS}


def main() -> None:
    """Train, measure and write the classifier."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=WEIGHTS / "classifier", help="folder of the classifier")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    classifier = train(options.steps)
    normalise(classifier)
    options.target.mkdir(parents=True, exist_ok=True)
    halves = {name: value.half().contiguous() for name, value in classifier.state_dict().items()}
    save_file(halves, options.target / "model.safetensors", {"format": "pt"})
    classifier.load_state_dict({name: value.float() for name, value in halves.items()})
    figures = {"n": MEASURED, "steps": options.steps, "accuracies": accuracies(classifier)}
    (options.target / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    write_manifest(options.target)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
