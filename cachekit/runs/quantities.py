"""Convert between outputs and the quantity that is cached: output, residual or x0."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cachekit.errors import PolicyError, SiteError
from cachekit.interface.moment import Streams, Time
from cachekit.interface.parts import Quantity

#: Combines a tensor with the shared part of what entered.
_Change = Callable[[Tensor, Tensor], Tensor]


def take(quantity: Quantity, output: Streams, entry: Streams, time: Time) -> Streams:
    """Take what is kept from an output and what entered; x0 and residuals of the denoiser are for its first tensor.

    Raises `SiteError` where output and entry differ in shape so that no residual exists, and `PolicyError` where the
    scheduler gives no x0.
    """
    if quantity == "output":
        return output
    if quantity == "x0":
        return _changed(output, entry, lambda made, sample: x0_of(sample, made, time))
    return tuple(made - into for made, into in zip(output, matching(output, entry)))


def matching(output: Streams, entry: Streams) -> Streams:
    """Check that what entered has the shapes of what left; raises `SiteError` otherwise."""
    left, entered = ([tuple(stream.shape) for stream in streams] for streams in (output, entry))
    if left != entered:
        raise SiteError(f"{entered} entered, but {left} left: there is no residual; use of=output or another policy")
    return entry


def give_back(quantity: Quantity, predicted: Streams, entry: Streams, time: Time) -> Streams:
    """Make an output from what was predicted and what enters now."""
    if quantity == "output":
        return predicted
    if quantity == "x0":
        return _changed(predicted, entry, lambda clean, sample: output_of(sample, clean, time))
    return tuple(into + added for into, added in zip(entry, predicted))


def take_whole(quantity: Quantity, output: Streams, sample: Tensor, time: Time) -> Streams:
    """Take what is kept from the output of a denoiser given `sample`; channels that only one of both has stay."""
    if quantity == "residual":
        return _changed(output, (sample,), lambda made, into: made - into)
    return take(quantity, output, (sample,), time)


def give_whole(quantity: Quantity, predicted: Streams, sample: Tensor, time: Time) -> Streams:
    """Make a denoiser's output from what was predicted and its present sample."""
    if quantity == "residual":
        return _changed(predicted, (sample,), lambda added, into: added + into)
    return give_back(quantity, predicted, (sample,), time)


def x0_of(sample: Tensor, output: Tensor, time: Time) -> Tensor:
    """Compute the clean sample that a denoiser's output implies for its sample alpha * x0 + sigma * noise."""
    alpha, sigma = _scales(time)
    if time.kind == "sample":
        return output
    if time.kind == "flow":
        return sample - sigma * output
    return alpha * sample - sigma * output if time.kind == "v_prediction" else (sample - sigma * output) / alpha


def output_of(sample: Tensor, clean: Tensor, time: Time) -> Tensor:
    """Compute the output that implies a clean sample."""
    alpha, sigma = _scales(time)
    if time.kind == "sample":
        return clean
    if time.kind == "flow":
        return (sample - clean) / sigma
    return (alpha * sample - clean) / sigma if time.kind == "v_prediction" else (sample - alpha * clean) / sigma


def _scales(time: Time) -> tuple[float, float]:
    if (not time.alpha and time.kind != "flow") or not time.sigma:
        raise PolicyError(
            f"of=x0: the scheduler gives no alpha and sigma at step {time.step}; use of=output, or a scheduler of"
            " diffusers that does"
        )
    return time.alpha or 0.0, time.sigma


def _changed(streams: Streams, entry: Streams, change: _Change) -> Streams:
    """Change the first tensor, where it has an element for each of what entered; the rest of it stays.

    Raises `SiteError` where the two have different numbers of dimensions.
    """
    first, into = streams[0], entry[0]
    if first.shape == into.shape:
        return (change(first, into).to(first.dtype), *streams[1:])
    if first.dim() != into.dim():
        shapes = f"{tuple(into.shape)} entered, but {tuple(first.shape)} left"
        raise SiteError(f"{shapes}: nothing of one can be taken from the other; use of=output or another policy")
    shared = tuple(slice(min(sizes)) for sizes in zip(first.shape, into.shape))
    changed = first.clone()
    changed[shared] = change(first[shared], into[shared]).to(first.dtype)
    return (changed, *streams[1:])
