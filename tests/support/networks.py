"""Networks with random weights, in the file formats that learned metrics read."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from cachekit.models.demo.pipeline import WEIGHTS

FEATURES = 5


class Network(nn.Module):
    """Features or classes of 8-bit images, with the interface of the Inception network of FID."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, FEATURES, 5, stride=3)
        self.classes = nn.Linear(FEATURES, 9)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        found = 30 * self.layer(img.to(torch.float32) / 128 - 1).relu().mean(dim=(2, 3))
        return found if return_features else self.classes(found)


def features(file):
    """Write a TorchScript network; the same network in Python."""
    torch.manual_seed(0)
    network = Network().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(network), str(file))
    return network


def alexnet(file):
    """Write AlexNet's weights under torchvision's names, with one of its classifier's."""
    torch.manual_seed(0)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    weights = {}
    for place, shape in shapes.items():
        weights[f"features.{place}.weight"] = torch.randn(shape) * (2 / torch.Size(shape[1:]).numel()) ** 0.5
        weights[f"features.{place}.bias"] = torch.randn(shape[0]) * 0.01
    weights["classifier.6.bias"] = torch.zeros(1000)
    torch.save(weights, file)
    return weights


def clip(folder):
    """Write a CLIP model and its processor."""
    # With this seed all cosines are above 0, where the score is cut off.
    torch.manual_seed(7)
    tokenizer = CLIPTokenizerFast.from_pretrained(WEIGHTS / "unet" / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**small, **tokens, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    vision = {**small, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
