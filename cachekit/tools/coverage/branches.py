"""Find the guidance branches of a pipeline's calls: change its prompts, and compare what the denoiser receives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from cachekit.interface.adapter import Layout
from cachekit.upstream.arguments import SAMPLE, TIMESTEP

#: Arguments that carry the condition, the first that a call has; those of its opposite begin with `negative_`.
_CONDITIONS = (
    *("prompt", "prompt_embeds", "prompt_embeds_qwen", "image_embeds", "class_labels", "image_embeddings"),
    *("example_image", "image", "content_prompt", "editing_prompt"),
)
_MOST_CALLS = 6

#: Tensors of a denoiser call, by argument.
Call = dict[str, Any]


def branches_of(modules: list[nn.Module], run: Callable[[dict[str, Any]], Any], given: dict[str, Any]) -> str:
    """Find the branches of the first step's calls, such as `uc` for one batch of two, or `c|u` for two calls.

    Each letter is a row of the batch: `c` changes with the prompt, `u` with the negative one, `b` with both and `-`
    with neither. `run` makes one uncached run from the same noise with some of the arguments `given` changed.
    """
    condition = next((name for name in _CONDITIONS if given.get(name) is not None), None)
    positive = [condition] if condition else []
    negative = [name for name in given if name.startswith("negative_") and given[name] is not None]
    plain, prompted, opposed = (_calls(modules, run, given, names) for names in ([], positive, negative))
    return "|".join(_rows(*calls) for calls in zip(plain, prompted, opposed))


def expected(layout: Layout) -> str:
    """Write a layout as `branches_of` should find it."""
    letters = [branch[0] for branch in layout.order]
    return "|".join(letters) if layout.separate else "".join(letters)


def agrees(found: str, layout: Layout) -> bool:
    """Whether a layout fits what was found; a row that changes with no prompt may be any branch."""
    if len(layout.order) == 1 or not found:
        return True
    return all(_row_agrees(rows, letters) for rows, letters in zip(found.split("|"), expected(layout).split("|")))


def _row_agrees(rows: str, letters: str) -> bool:
    """Whether a batch fits its branches; each may have several rows, one for each frame or image."""
    each, rest = divmod(len(rows), len(letters))
    of_letter = {letter: rows[place * each : (place + 1) * each] for place, letter in enumerate(letters)}
    return not rest and "c" not in of_letter.get("u", "") and ("c" in of_letter.get("c", "c") or "c" not in rows)


def _calls(
    modules: list[nn.Module], run: Callable[[dict[str, Any]], Any], given: dict[str, Any], names: list[str]
) -> list[Call]:
    seen: list[Call] = []
    with _watched(modules, seen):
        run({name: _changed(given[name]) for name in names})
    times = [_time(call) for call in seen]
    return [call for call, time in zip(seen, times) if time == times[0]][:_MOST_CALLS]


@contextlib.contextmanager
def _watched(modules: list[nn.Module], seen: list[Call]) -> Iterator[None]:
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
        if len(seen) < _MOST_CALLS:
            seen.append({name: list(_tensors(value)) for name, value in given.items()})

    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Find the tensors of an argument, copied, and its numbers, as a timestep may be one."""
    if isinstance(value, torch.Tensor):
        yield value.detach().clone()
    elif isinstance(value, (int, float)):
        yield torch.tensor(float(value))
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _time(call: Call) -> float | None:
    for name in (*TIMESTEP, "1"):
        for tensor in call.get(name, ()):
            if tensor.numel():
                return float(tensor.max())
    return None


def _rows(plain: Call, prompted: Call, opposed: Call) -> str:
    by_prompt, by_opposite = _different(plain, prompted), _different(plain, opposed)
    letters = {(True, True): "b", (True, False): "c", (False, True): "u", (False, False): "-"}
    count = _batch(plain)
    return "".join(letters[row in by_prompt, row in by_opposite] for row in range(count))


def _sample(call: Call) -> list[torch.Tensor]:
    return next((call[name] for name in (*SAMPLE, "0") if call.get(name)), [])


def _batch(call: Call) -> int:
    tensors = _sample(call)
    if len(tensors) == 1:
        return int(tensors[0].shape[0]) if tensors[0].dim() else 1
    return len(tensors) or 1


def _different(one: Call, other: Call) -> set[int]:
    """Find the rows of the batch in which two calls differ; a batch may be a list with a tensor for each row."""
    count = _batch(one)
    listed = len(_sample(one)) == count > 1
    found: set[int] = set()
    for name in one.keys() & other.keys():
        for place, (left, right) in enumerate(zip(one[name], other[name])):
            if listed and len(one[name]) == count:
                found |= set() if _same(left, right) else {place}
            else:
                found |= {row for row in range(count) if not _same(_row(left, row, count), _row(right, row, count))}
    return found


def _row(tensor: torch.Tensor, row: int, count: int) -> torch.Tensor:
    """Cut out a row of the batch, which for text may be one for each frame; what has no batch is in every row."""
    size = tensor.shape[0] if tensor.dim() else 0
    return tensor.chunk(count)[row] if size and size % count == 0 else tensor


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and bool(torch.equal(left, right))


def _changed(value: Any) -> Any:
    """Make another value of the same kind and size."""
    if isinstance(value, str):
        return value[::-1]
    if isinstance(value, (list, tuple)):
        return type(value)(_changed(one) for one in value)
    if isinstance(value, torch.Tensor):
        return value.roll(1, -1)
    if isinstance(value, int):
        return value + 1
    if hasattr(value, "point"):
        return value.point(lambda level: 255 - level)
    return value
