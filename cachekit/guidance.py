"""Know how guidance branches reach a denoiser, and narrow a call to one of them at its boundary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .adapter import Layout
from .arguments import by_name
from .errors import GuidanceError
from .sites import Branches
from .tree import tensors, tree_map

#: Arguments whose first dimension may count frames too: a multiple of the batch.
_PER_FRAME = ("encoder_hidden_states", "additional_residual")

#: What denoisers call their sample.
SAMPLE = ("sample", "hidden_states", "x", "vision_tokens")
#: What diffusers' pipelines call the calls of two branches.
PAIR = ("cond", "uncond")

#: Pipelines that say they are unguided whatever they are given.
_TELL_NOTHING = ("StableDiffusionPanoramaPipeline",)
#: Arguments of guidance that has a branch beside the two.
_THIRD_BRANCH = ("image_guidance_scale", "sld_guidance_scale")


@dataclass(frozen=True)
class Observation:
    """Hold what an observing policy may look at after a guided call.

    `outputs` maps each branch to its output `(batch, channels, ...)`; `sample` is the input that all branches
    share, scaled as the denoiser saw it; `step` is 0-based. `negated` says that the pipeline turns the outputs' sign.
    """

    step: int
    outputs: Mapping[str, Tensor]
    sample: Tensor
    timestep: Any
    scheduler: Any = field(repr=False, default=None)
    negated: bool = False

    def denoised(self, branch: str) -> Tensor:
        """Return the branch's prediction of the clean sample, x0.

        Channels that only one of both has, an input image or a learned variance, are left out.
        """
        output = -self.outputs[branch] if self.negated else self.outputs[branch]
        shared = tuple(slice(min(sizes)) for sizes in zip(self.sample.shape, output.shape))
        return predict_x0(self.sample[shared], output[shared], self.timestep, self.scheduler)


def predict_x0(sample: Tensor, output: Tensor, timestep: Any, scheduler: Any) -> Tensor:
    """Return x0 from the denoiser's scaled input and output, both `(batch, channels, ...)`.

    Sigma-based schedulers hand the denoiser x / sqrt(sigma^2 + 1), which is the variance-preserving sample of
    the same timestep, so one formula serves both kinds; rectified flows use x - sigma v. Raise `GuidanceError`
    for a scheduler that has neither of both, makes its prediction of the output by itself (EDM), or for samples of
    whole numbers.
    """
    table, sigmas = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "sigmas", None)
    known = isinstance(table, Tensor) or isinstance(sigmas, Tensor)
    if not known or hasattr(scheduler, "precondition_outputs") or not sample.is_floating_point():
        raise GuidanceError(f"x0 is not known from outputs under {type(scheduler).__name__}; compare predictions (eps)")
    prediction = getattr(scheduler.config, "prediction_type", "epsilon")
    if table is None or prediction == "flow_prediction":
        flow: Tensor = sample - _flow_sigma(scheduler).to(sample) * output
        return flow
    time = torch.as_tensor(timestep, device=sample.device).reshape(-1)[0]
    sigma = _sigma(table.to(sample.device), time, scheduler).to(sample.dtype)
    signal, noise = (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()
    if prediction == "v_prediction":
        clean: Tensor = signal * sample - noise * output
    else:
        clean = output if prediction == "sample" else (sample - noise * output) / signal
    return clean


def _flow_sigma(scheduler: Any) -> Tensor:
    """Return the share of noise at the present step; pipelines give denoisers its time in several scales.

    Where sigmas are shares of the clean sample, and outputs point to it, the share of noise is negative.
    """
    index = getattr(scheduler, "step_index", None)
    share: Tensor = scheduler.sigmas[(getattr(scheduler, "begin_index", None) or 0) if index is None else index]
    return share - 1 if getattr(scheduler.config, "invert_sigmas", False) else share


def _sigma(table: Tensor, time: Tensor, scheduler: Any) -> Tensor:
    """Return noise over signal at a timestep, which may lie between two of the training's."""
    if getattr(scheduler.config, "timestep_type", "") == "continuous":
        return (4 * time).exp()
    sigmas = ((1 - table) / table).sqrt()
    time = time.clamp(0, len(table) - 1)
    low, high = sigmas[time.floor().long()], sigmas[time.ceil().long()]
    return torch.lerp(low, high, time.to(low.dtype).frac())


def is_guided(pipe: Any, arguments: Mapping[str, Any], denoiser: Any, context: str | None) -> bool | None:
    """Tell whether the pipeline's present run is guided, or None when it does not say.

    The pipeline's own property is right from the first call of the denoiser on. Without one, the name of a call
    (`context`) leaves it open until the second. A guidance scale above 1 may mean two branches, or feed an
    embedding; true guidance beside it, or guidance by an image, mean more than one; anything else means one.
    """
    if type(pipe).__name__ in _TELL_NOTHING:
        return _above_one(arguments, "guidance_scale")
    told = getattr(pipe, "do_classifier_free_guidance", None)
    if told is not None:
        return bool(told)
    if context in PAIR:
        return None
    negative = any(arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    if negative and _above_one(arguments, "true_cfg_scale"):
        return True
    embedded = (getattr(denoiser, "config", None) or {}).get("guidance_embeds")
    scales = [name for name in arguments if name.endswith("guidance_scale")]  # of a prior and a decoder
    own = ["guidance_scale"] if "guidance_scale" in scales else scales
    if embedded or not any(_above_one(arguments, name) for name in own):
        return False
    return True if any(name in arguments for name in _THIRD_BRANCH) else None


def _above_one(arguments: Mapping[str, Any], name: str) -> bool:
    scale = arguments.get(name)
    return isinstance(scale, (int, float)) and scale > 1


def refuse_unfit(pipe: Any, arguments: Mapping[str, Any], sample: Tensor, timestep: Any) -> None:
    """Raise `GuidanceError` for runs whose calls nobody may skip or narrow.

    A pipeline may itself read attention maps, take gradients through the denoiser, or run several steps at once.
    """
    reason = ""
    if (arguments.get("sag_scale") or 0) > 0:
        reason = "self-attention guidance reads the attention of every step; set sag_scale=0"
    elif arguments.get("use_cross_attn_mask") or arguments.get("use_intersect_mask"):
        reason = "its masks are made of every step's attention; set use_cross_attn_mask and use_intersect_mask to False"
    elif sample.requires_grad:
        reason = "gradients are taken through the denoiser; detach the sample"
    elif _has_several_steps(timestep):
        reason = "one call holds several steps; run them one by one"
    if reason:
        name = "a bare loop" if pipe is None else type(pipe).__name__
        raise GuidanceError(f"{name}: {reason}, or call cachekit.remove(pipe)")


def _has_several_steps(timestep: Any) -> bool:
    """Tell whether a batch holds different timesteps; a table of them by token, as in video, has two dimensions."""
    if not isinstance(timestep, Tensor) or timestep.dim() != 1 or timestep.numel() < 2 or timestep.is_meta:
        return False
    return timestep.stride(0) != 0 and bool((timestep != timestep[0]).any())


def as_batch(sample: Any) -> Any:
    """Return what a denoiser is given as sample; a list with a tensor for each image, all of one size, is stacked."""
    if not isinstance(sample, list) or not all(isinstance(one, Tensor) for one in sample):
        return sample
    return torch.stack(sample) if len({one.shape for one in sample}) == 1 else sample


def branches_share(sample: Tensor, layout: Layout) -> bool:
    """Tell whether a batch holds the same latents once per branch, as batched guidance does.

    Where the condition is an image, it fills the second half of the sample's channels and differs.
    """
    count = len(layout.order)
    if sample.shape[0] % count:
        return False
    if sample.is_meta:
        return True
    if layout.condition == "image":
        sample = sample.narrow(2, 0, sample.shape[2] // 2)
    first, *others = sample.chunk(count)
    return all(torch.equal(first, other) for other in others)


@dataclass(frozen=True)
class FirstCall:
    """Hold what the first call of a run shows of its guidance.

    `told` is what the pipeline says, `context` the name that it gives the call, `narrows` whether any policy
    would drop a branch, `perturbed` whether attention is perturbed for one, `remembers` whether calls leave
    something behind in the denoiser's arguments, `momentum` whether guidance adds up earlier steps; `denoiser` is
    the name of its class, for errors.
    """

    told: bool | None
    sample: Tensor
    context: str | None
    narrows: bool
    denoiser: str
    perturbed: bool = False
    remembers: bool = False
    momentum: bool = False


def layout_of_run(first: FirstCall, layout: Layout) -> Layout:
    """Return how the branches of a run come, from what its first call shows.

    A pipeline that names its calls after branches makes one for each. A batch is what the pipeline told, checked
    against the latents themselves; a bare loop tells nothing (None), and there equal parts of the batch are its
    branches. Raise `GuidanceError` where a policy would drop a branch of something else (three branches, calls
    without names): guessing would mix images. Where no policy would, each call is a whole of its own.
    """
    if first.remembers and first.told is not False:
        return _refuse_or_alone(first, layout, "each call writes keys and values that later ones of its branch read")
    if first.momentum:
        return _refuse_or_alone(first, layout, "the guider adds up what branches differed by; set its momentum to None")
    if first.context in PAIR and (first.told is not False or first.context == PAIR[1]):
        other = PAIR[1 - PAIR.index(first.context)]
        return layout.by_calls((first.context, other))
    if first.told is False:
        return layout.alone
    if first.perturbed:
        return _refuse_or_alone(first, layout, "perturbed-attention guidance adds a branch of its own; set pag_scale=0")
    if first.told and layout.calls:
        return layout.by_calls(layout.calls)
    if branches_share(first.sample, layout):
        return layout
    if not first.told:
        return layout.alone
    batch = f"a guided batch of {first.sample.shape[0]} is not {' and '.join(layout.order)} over the same latents"
    return _refuse_or_alone(first, layout, batch)


def _refuse_or_alone(first: FirstCall, layout: Layout, reason: str) -> Layout:
    if not first.narrows:
        return layout.alone
    raise GuidanceError(
        f"{first.denoiser}: {reason}; no branch of it can be dropped: this pipeline's guidance is not supported,"
        " call cachekit.remove(pipe), or apply policies that keep all branches"
    )


def pick_call(
    call: tuple[tuple[Any, ...], dict[str, Any]], parameters: Sequence[str], layout: Layout, branch: str, batch: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments (args, kwargs) of a call, cut down to one branch; `parameters` names the positional ones."""
    args, kwargs = call
    picked = pick(by_name(parameters, args, kwargs), layout, branch, batch)
    return tuple(picked.pop(name) for name in parameters[: len(args)]), picked


def pick(arguments: Mapping[str, Any], layout: Layout, branch: str, batch: int) -> dict[str, Any]:
    """Return the denoiser's arguments with every batched tensor cut down to one branch.

    `batch` is the size of dimension 0 over all branches. Nested dicts, lists and masks are included; text
    and residuals may be repeated per frame, so their first dimension may be a multiple of `batch`. Where the
    sample is a list with a tensor for each image, so is every other list of that length.
    """
    place, count = layout.order.index(branch), len(layout.order)

    def cut(name: str) -> Callable[[Tensor], Tensor]:
        dim = 1 if name in layout.layered else 0
        multiples = dim == 0 and any(part in name for part in _PER_FRAME)

        def one(tensor: Tensor) -> Tensor:
            size = tensor.shape[dim] if tensor.dim() > dim else 0
            batched = size == batch or (multiples and size > 0 and size % batch == 0)
            return tensor.chunk(count, dim)[place] if batched else tensor

        return one

    listed = any(isinstance(arguments.get(name), list) for name in SAMPLE)
    items = slice(place * batch // count, (place + 1) * batch // count)
    return {
        name: (value[items] if len(value) == batch else value)
        if listed and isinstance(value, list)
        else _pick_one(name, value, layout, cut)
        for name, value in arguments.items()
    }


def _pick_one(name: str, value: Any, layout: Layout, cut: Callable[[str], Callable[[Tensor], Tensor]]) -> Any:
    if name in layout.unbatched:
        return value
    if isinstance(value, dict):
        named = ((key, key if isinstance(key, str) else name, item) for key, item in value.items())
        return {key: _pick_one(own, item, layout, cut) for key, own, item in named}
    return tree_map(cut(name), value)


def as_batches(output: Any) -> Any:
    """Return a denoiser's output, a tree, with each list of tensors stacked."""
    if isinstance(output, list):
        return torch.stack(output)
    return _within(as_batches, output)


def as_lists(output: Any) -> Any:
    """Return what `as_batches` gave as a tree of lists again."""
    return list(output.unbind()) if isinstance(output, Tensor) else _within(as_lists, output)


def _within(change: Callable[[Any], Any], output: Any) -> Any:
    if isinstance(output, dict):
        return type(output)(**{name: change(value) for name, value in output.items()})
    return tuple(change(value) for value in output) if isinstance(output, tuple) else output


def spread(output: Any, layout: Layout, branch: str, restore: Callable[[Tensor], Tensor]) -> Any:
    """Return a one-branch output as the pair the pipeline expects.

    The dropped branches' outputs come from `restore`; by default that is the same output, and then the
    pipeline's own u + g * (c - u) is exactly it.
    """

    def join(tensor: Tensor) -> Tensor:
        if not tensor.dim():  # a loss, say
            return tensor
        return torch.cat([tensor if name == branch else restore(tensor) for name in layout.order])

    return tree_map(join, output)


def by_branch(output: Any, branches: Branches) -> dict[str, tuple[Tensor, ...]]:
    """Return the part `(batch, ...)` of each branch, of each tensor of a denoiser's output that holds them all."""
    count = len(branches)
    whole = (tensor for tensor in tensors(output) if tensor.dim() and tensor.shape[0] % count == 0)
    return dict(zip(branches, zip(*(tensor.chunk(count) for tensor in whole))))
