"""Trained networks that score images, loaded from local files: LPIPS, CLIP score and features for FID."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cachekit.tools.bench.cells import BenchError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Features", "clip_score", "lpips", "pixels"]

#: Exceptions raised by reading a file of another kind.
_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, TypeError, pickle.PickleError)
#: Mean and standard deviation of the colours that AlexNet was trained on.
_COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(image: Image, device: Any) -> torch.Tensor:
    """Image as a uint8 tensor (1, 3, height, width)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].to(device)


@contextmanager
def _reading(metric: str, path: str, wanted: str) -> Iterator[None]:
    """Turn an exception from a wrong file into one line that names the file and what the metric expects."""
    try:
        yield
    except _UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BenchError(f"metric {metric}={path}: cannot read it as {wanted}: {reason}; give another path") from error


# -- LPIPS ------------------------------------------------------------------------------------------------


class _Lpips(nn.Module):
    """LPIPS: a weighted distance of AlexNet features, layer by layer (arXiv 1801.03924, equation 1)."""

    #: The layers whose outputs are compared: the five ReLUs.
    _TAPS = (1, 4, 7, 9, 11)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )
        # w of the equation: the weight of each channel.
        self.weights = nn.ParameterList(torch.zeros(1, size, 1, 1) for size in (64, 192, 384, 256, 256))

    def forward(self, image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Distance of two uint8 images (1, 3, height, width)."""
        pairs = zip(self.weights, self._unit(image), self._unit(reference))
        return torch.stack([(weight * (one - other) ** 2).sum(1).mean() for weight, one, other in pairs]).sum()

    def _unit(self, image: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the features of each compared layer, scaled to unit length at every position."""
        mean, deviation = (torch.tensor(values, device=image.device).view(1, 3, 1, 1) for values in _COLOURS)
        found = (image.float() / 255 - mean) / deviation
        for place, layer in enumerate(self.features):
            found = layer(found)
            if place in self._TAPS:
                yield nn.functional.normalize(found, dim=1, eps=1e-10)


def lpips(path: str, device: Any) -> Callable[[Image, Image], float]:
    """Load LPIPS over AlexNet: torchvision's weights from `path`, the channel weights from torchmetrics."""
    net = _Lpips()
    with _reading("lpips", path, "torchvision's weights of AlexNet"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        net.features.load_state_dict(
            {name.removeprefix("features."): value for name, value in weights.items() if name.startswith("features.")}
        )
    for place, layer in enumerate(_linear_layers()):
        net.weights[place].data = layer
    net.requires_grad_(False).to(device).eval()
    return lambda image, reference: float(net(pixels(image, device), pixels(reference, device)))


def _linear_layers() -> list[torch.Tensor]:
    """Load the published channel weights of the five layers, which torchmetrics ships."""
    torchmetrics()
    source = resources.files("torchmetrics.functional.image").joinpath("lpips_models/alex.pth")
    with resources.as_file(source) as file:
        held = torch.load(file, map_location="cpu", weights_only=True)
    return [held[f"lin{place}.model.1.weight"] for place in range(5)]


def torchmetrics() -> Any:
    """Import torchmetrics, or raise `BenchError` with the command that installs it."""
    try:
        import torchmetrics
    except ImportError as error:
        raise BenchError(
            f"this metric needs torchmetrics ({error}): pip install 'cachekit-diffusion[bench]'"
        ) from error
    return torchmetrics


# -- CLIP score -------------------------------------------------------------------------------------------


def clip_score(path: str, device: Any) -> Callable[[Image, str], float]:
    """Load a CLIP model from the folder `path`; the score is 100 times the cosine, and at least 0."""
    from transformers import CLIPModel, CLIPProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with _reading("clip", path, "the folder of a CLIP model with its processor"):
        model, found = CLIPModel.from_pretrained(path, local_files_only=True, output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(f"weights are missing, such as {min(found['missing_keys'])}")
        processor = CLIPProcessor.from_pretrained(path, local_files_only=True)
    model.requires_grad_(False).to(device).eval()
    given = {"return_tensors": "pt", "truncation": True, "max_length": model.config.text_config.max_position_embeddings}

    def judge(image: Image, caption: str) -> float:
        output = model(**processor(text=[caption], images=[image.convert("RGB")], **given).to(device))
        # Both embeddings have unit length.
        return max(100 * float((output.image_embeds * output.text_embeds).sum()), 0.0)

    return judge


# -- features ---------------------------------------------------------------------------------------------


class Features(nn.Module):
    """Features of images from a TorchScript network, which contains its own architecture.

    It maps uint8 images (batch, 3, height, width) to (batch, features), called with `return_features=True` where it
    has that parameter, as the Inception network that StyleGAN and clean-fid publish for FID does.
    """

    def __init__(self, path: str, device: Any) -> None:
        """Load the network and run it once."""
        super().__init__()
        with _reading("fid", path, "a TorchScript network that takes images"), warnings.catch_warnings():
            # torch deprecates TorchScript, but the networks that define FID are published in it.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.net = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
            known = {argument.name for argument in self.net.forward.schema.arguments}
            self._options = {"return_features": True} if "return_features" in known else {}
            trial = self(torch.zeros(1, 3, 299, 299, dtype=torch.uint8, device=device))
            if trial.dim() != 2:
                raise ValueError(f"it gives a tensor {tuple(trial.shape)}, not (batch, features)")
        self.num_features = trial.shape[1]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (batch, features) of uint8 images (batch, 3, height, width)."""
        found: torch.Tensor = self.net(images, **self._options)
        return found
