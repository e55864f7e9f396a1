"""Digests of models: whatever changes what they compute changes the digest, and nothing else does."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from support import tiny
from torch import nn

from cachekit.upstream.fingerprints import fingerprint


def spelled_out(model):
    """The digest of a model, computed parameter by parameter."""
    found, values = hashlib.sha256(), []
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        values.append(flat[:: max(1, len(flat) // 16)][:16].to(torch.bfloat16))
    found.update(torch.cat(values).view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:16]


@pytest.fixture
def unet():
    return tiny.small().unet


def tied(unet):
    unet.conv_out.bias = unet.conv_norm_out.bias
    unet.extra = unet.conv_in
    return unet


@pytest.mark.parametrize("make", [lambda unet: unet, lambda unet: tiny.pixart().transformer, tied])
def test_it_is_of_names_shapes_and_values(unet, make):
    assert fingerprint(make(unet)) == spelled_out(make(unet))


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.to(memory_format=torch.channels_last),
        lambda unet: unet.requires_grad_(False),
        lambda unet: copy.deepcopy(unet),
        lambda unet: unet.load_state_dict({k: v.clone() for k, v in unet.state_dict().items()}, assign=True) and unet,
        lambda unet: unet.bfloat16().to(torch.float64),
    ],
)
def test_it_stays_where_the_values_do(unet, change):
    unet.bfloat16().float()
    before = fingerprint(unet)
    assert fingerprint(change(unet)) == before


def ema(unet):
    average = EMAModel([parameter * 2 for parameter in unet.parameters()])
    average.copy_to(unet.parameters())


def fuse(unet):
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    unet.fuse_lora()
    unet.unload_lora()


def replace_module(unet):
    unet.conv_in = nn.Conv2d(4, unet.conv_in.out_channels, 3, padding=1)


#: Among them edits of `.data`, which leave versions and addresses of tensors as they are.
EDITS = {
    "in place": lambda unet: torch.nn.init.ones_(unet.conv_in.weight),
    "data in place": lambda unet: unet.conv_in.weight.data.mul_(2),
    "data replaced": lambda unet: setattr(unet.conv_in.weight, "data", unet.conv_in.weight.data * 2),
    "state loaded": lambda unet: unet.load_state_dict({k: v * 2 for k, v in unet.state_dict().items()}),
    "state assigned": lambda unet: unet.load_state_dict({k: v * 2 for k, v in unet.state_dict().items()}, assign=True),
    "module replaced": replace_module,
    "average": ema,
    "LoRA fused": fuse,
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_are_seen(unet, edit):
    before = fingerprint(unet)
    edit(unet)
    assert fingerprint(unet) != before


def test_which_loras_act_and_how_strongly_is_part_of_it(unet):
    seen = [fingerprint(unet)]
    for name in ("one", "two"):
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), name)
    for names, weights in [("one", 1.0), ("one", 0.5), ("two", 1.0), (["one", "two"], [1.0, 1.0])]:
        unet.set_adapters(names, weights)
        seen.append(fingerprint(unet))
        assert fingerprint(unet) == seen[-1]
    unet.disable_lora()
    seen.append(fingerprint(unet))
    assert len(set(seen)) == len(seen)
    unet.delete_adapters(["one", "two"])
    unet.unload_lora()
    assert fingerprint(unet) == seen[0]


def test_weights_that_are_elsewhere_have_none():
    with torch.device("meta"):
        assert fingerprint(nn.Linear(2, 2)) == ""
