"""Policies on denoisers whose weights are quantised, lie on several devices, or are exchanged in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig, PixArtTransformer2DModel, TorchAoConfig
from support import compiling, tiny
from support.compiling import graphs
from support.lora import weights

import cachekit
from cachekit.testing.subject import distance
from cachekit.upstream.fingerprints import fingerprint

__all__ = ["graphs"]

STEPS = 5
SPECS = {
    "pixart": ("tgate:m=3", "cache:where=span(first=1),when=every(2),what=reuse(of=residual)"),
    "flux": ("taylorseer:interval=2,warm_up=1", "cache:where=denoiser,when=mask(0;1;2;4),what=linear"),
    "sd": ("tgate:m=3", "deepcache:interval=2"),
}


def draw(pipe: Any) -> torch.Tensor:
    return tiny.latents(pipe, steps=STEPS)


def cached_alike(name: str, pipe: Any, other: Any, far: float) -> None:
    """Check that a pipeline is cached, again and undone, with the actions and the MACs of an ordinary one.

    Uncached and cached, the images of both differ by at most `far` of their norm.
    """
    plain, specs = draw(pipe), SPECS[name]
    with cachekit.apply(other, specs) as attachment:
        nearly = draw(other)
        expected = attachment.report()
    with cachekit.apply(pipe, specs) as attachment:
        found = draw(pipe)
        report = attachment.report()
        assert torch.equal(draw(pipe), found)
    assert report.counts == expected.counts
    assert report.macs == expected.macs
    assert sum(count.reused for count in report.counts) > 0
    if name != "sd":
        both = [cachekit.estimate(one, specs, num_inference_steps=STEPS).macs for one in (pipe, other)]
        assert both[0] == both[1]
    assert torch.equal(draw(pipe), plain)
    assert distance(plain, draw(other)) < far
    assert distance(found, nearly) < far
    assert not torch.allclose(found, plain, atol=1e-3)


# -- quantised weights ------------------------------------------------------------------------------------


def check_digests(denoiser: Any, other: Any) -> None:
    """Check that calibrations of the quantised model and of the ordinary one do not serve each other."""
    assert fingerprint(denoiser) not in ("", fingerprint(other))


def test_int8_weights_of_torchao(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="`make test` runs this by itself, with torchao")
    pipe, other = tiny.pixart(), tiny.pixart()
    pipe.transformer.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pipe.transformer = PixArtTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=config, torch_dtype=torch.float32
    )
    assert not torch.equal(draw(pipe), draw(other))
    cached_alike("pixart", pipe, other, far=0.2)
    check_digests(pipe.transformer, other.transformer)


def written(model: Any, path: Path) -> None:
    """Write a GGUF file with weights of 8 bits wherever rows are long enough."""
    import gguf

    writer, eight = gguf.GGUFWriter(path, "flux"), gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        value = tensor.float().numpy()
        if value.ndim == 2 and value.shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(value, eight), raw_dtype=eight)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_of_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="no gguf, which the extra `test` installs")
    pipe, other = tiny.flux(), tiny.flux()
    pipe.transformer.save_config(tmp_path)
    written(pipe.transformer, tmp_path / "flux.gguf")
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    given = {"config": str(tmp_path), "quantization_config": config, "torch_dtype": torch.float32}
    pipe.transformer = FluxTransformer2DModel.from_single_file(str(tmp_path / "flux.gguf"), **given)
    assert {type(module).__name__ for module in pipe.transformer.modules()} >= {"GGUFLinear"}
    assert not torch.equal(draw(pipe), draw(other))
    cached_alike("flux", pipe, other, far=0.2)
    check_digests(pipe.transformer, other.transformer)


# -- device maps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before_apply", [True, False])
def test_a_device_map_of_accelerate(before_apply: bool, tmp_path: Path) -> None:
    """Blocks lie on the disk, and are read for each call that computes them."""
    pipe, other = compiling.unet(), compiling.unet()
    device_map = {name: "disk" if "block" in name else "cpu" for name, _ in pipe.unet.named_children()}

    def dispatched(denoiser: Any) -> None:
        dispatch_model(denoiser, device_map, offload_dir=str(tmp_path))
        assert {weight.device.type for weight in denoiser.parameters()} == {"cpu", "meta"}

    with cachekit.apply(other, SPECS["sd"]):
        expected = draw(other)
    if before_apply:
        dispatched(pipe.unet)
        cached_alike("sd", pipe, other, far=1e-4)
    with cachekit.apply(pipe, SPECS["sd"]):
        if not before_apply:
            dispatched(pipe.unet)
        assert torch.allclose(draw(pipe), expected, atol=1e-4)


# -- weights that are exchanged in place ------------------------------------------------------------------


def lora(pipe: Any, seed: int, **how: Any) -> Any:
    pipe.load_lora_weights(weights(compiling.unet().unet, seed), adapter_name="one", **how)
    return pipe


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_lora_is_swapped_in_place(is_compiled: bool, graphs: compiling.Graphs) -> None:
    """The modules stay, and so does what is compiled; the next run is that of the new weights."""
    pipe, other = (lora(compiling.unet(), seed) for seed in (0, 1))
    if is_compiled:
        pipe.unet.compile_repeated_blocks(backend=graphs)
    with cachekit.apply(pipe, "tgate:m=3"), cachekit.apply(other, "tgate:m=3"):
        first, count = draw(pipe), graphs.count
        lora(pipe, 1, hotswap=True)
        assert torch.equal(draw(pipe), draw(other))
        lora(pipe, 0, hotswap=True)
        assert torch.equal(draw(pipe), first)
        assert graphs.count == count
        assert not torch.allclose(first, draw(other), atol=1e-2)
    assert (count > 0) == is_compiled
