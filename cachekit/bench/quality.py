"""Judge images by learned metrics whose weights are at hand: LPIPS and CLIP score, through torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import nearest
from .cells import BenchError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["METRICS", "Metric", "load_metrics", "parse_metrics"]

#: Judge an image beside the uncached one, with the caption of both.
Metric = Callable[["Image", "Image", str], float]


def parse_metrics(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return (name, path) of texts such as `lpips=alexnet.pth`; nothing is loaded."""
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if name not in METRICS:
            known = ", ".join(METRICS)
            raise BenchError(f"unknown metric {name!r}{nearest(name, METRICS)}; known besides PSNR and SSIM: {known}")
        if not equals or not Path(path).exists():
            raise BenchError(f"metric {text!r}: give the path of its weights, {name}=PATH")
        found[name] = path
    return tuple(sorted(found.items()))


def load_metrics(chosen: Iterable[tuple[str, str]], device: Any) -> dict[str, Metric]:
    """Return the metrics of (name, path) pairs."""
    return {name: METRICS[name](path, device) for name, path in chosen}


def _torchmetrics() -> Any:
    try:
        import torchmetrics
    except ImportError as error:
        raise BenchError("learned metrics need torchmetrics: pip install 'cachekit-diffusion[bench]'") from error
    return torchmetrics


def _tensor(image: Image, device: Any) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).to(device)


def _lpips(path: str, device: Any) -> Metric:
    """Return LPIPS over AlexNet; `path` holds torchvision's weights, the linear layers come with torchmetrics."""
    import torch

    _torchmetrics()
    try:
        from torchmetrics.functional.image.lpips import _LPIPS

        # A random backbone is asked for, since the other way is a download.
        net = _LPIPS(net="alex", pnet_rand=True)
    except (ImportError, ModuleNotFoundError) as error:
        raise BenchError("lpips needs torchvision: pip install 'cachekit-diffusion[bench]'") from error
    weights = torch.load(path, map_location="cpu", weights_only=True)
    names = {name: "features." + name.split(".", 1)[1] for name in net.net.state_dict()}
    net.net.load_state_dict({name: weights[source] for name, source in names.items()})
    net.to(device).eval()

    def judge(image: Image, reference: Image, caption: str) -> float:
        pair = [_tensor(one, device)[None].float() / 127.5 - 1 for one in (image, reference)]
        with torch.no_grad():
            return float(net(*pair).mean())

    return judge


def _clip(path: str, device: Any) -> Metric:
    """Return the CLIP score by the model in the folder `path`."""
    import torch

    _torchmetrics()
    from torchmetrics.functional.multimodal import clip_score

    def judge(image: Image, reference: Image, caption: str) -> float:
        with torch.no_grad():
            return float(clip_score(_tensor(image, device), caption, model_name_or_path=path))

    return judge


METRICS: dict[str, Callable[[str, Any], Metric]] = {"clip": _clip, "lpips": _lpips}
