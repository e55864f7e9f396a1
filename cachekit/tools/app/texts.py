"""What the app writes: tables and messages as HTML in which every given text is escaped, and lines of Python."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from cachekit.amounts import table
from cachekit.models.names import DEMOS, is_architecture
from cachekit.tools.bench.figures import FIGURES
from cachekit.upstream.calling import SCALE

if TYPE_CHECKING:
    from cachekit.tools.app.drawing import Comparison, Picture, Request
    from cachekit.tools.app.preview import Preview

__all__ = ["comparison", "costs", "heat_map", "message", "problem", "python_lines"]


def message(text: str) -> str:
    """Write a paragraph."""
    return f"<p>{escape(text)}</p>"


def problem(error: Exception) -> str:
    """Write an error as a paragraph of one line, with its type where it is none of cachekit's."""
    return f"<p class='problem' role='alert'>{escape(' '.join(str(error).split()) or type(error).__name__)}</p>"


def heat_map(preview: Preview) -> str:
    """Draw the plan."""
    return _wide(preview.plan.picture())


def _wide(inside: str) -> str:
    """Have what may be wider than its column scroll within it."""
    return f"<div class='wide'>{inside}</div>"


def costs(preview: Preview) -> str:
    """Write the estimate of a run beside that of the uncached one."""
    found = preview.estimate
    total = f"{found.mac_reduction:.2f}x MAC reduction"
    if not preview.plan.is_static:
        total += ", and more: what is decided during the run (?) counts as computed"
    return message(total) + _wide(table(found.totals, ("estimate of an image", "uncached", "cached")))


def comparison(drawn: Sequence[Comparison]) -> str:
    """Write a row for each picture: the uncached one, those with policies, and plain steps of equal cost."""
    if not drawn:
        return ""
    first = drawn[0]
    rows = [_row("uncached", first, first.uncached)]
    for one in drawn:
        rows.append(_row(" + ".join(one.specs), one, one.cached))
        if one.plain:
            rows.append(_row(f"{one.plain.steps} plain steps, of equal cost", one, one.plain))
    header = ("picture", "MAC reduction", "seconds", "speedup", "PSNR", "SSIM", "kept")
    return _wide(table(rows, header))


def _row(label: str, drawn: Comparison, picture: Picture) -> tuple[str, ...]:
    psnr, ssim = drawn.similarity_of(picture)
    figures = {
        "mac_reduction": _reduction(drawn, picture),
        "seconds": picture.seconds,
        "speedup": drawn.uncached.seconds / picture.seconds,
        "psnr": psnr,
        "ssim": ssim,
        "cache_bytes": picture.report.cache_bytes if picture.report else 0,
    }
    return (label, *("unknown" if value is None else FIGURES[name].format(value) for name, value in figures.items()))


def _reduction(drawn: Comparison, picture: Picture) -> float | None:
    return picture.mac_reduction if picture.report else drawn.uncached.steps / picture.steps


def python_lines(request: Request, specs: Sequence[str], device: str = "cpu", dtype: str | None = None) -> str:
    """Write the lines that draw the picture with policies; for an architecture, those that estimate it.

    `device` and `dtype` are those that the pipeline is loaded with.
    """
    listed = f"[{', '.join(map(repr, specs))}]"
    if is_architecture(request.model):
        call = f"cachekit.estimate({request.model!r}, {listed}, num_inference_steps={request.steps})"
        return f"import cachekit\n\nprint({call}.mac_reduction)\n"
    scale = "" if request.guidance is None else f", {SCALE}={request.guidance:g}"
    kind = DEMOS.get(request.model)
    imports = ["import torch", "", "import cachekit"] if kind else ["import torch", "from diffusers import "
               "DiffusionPipeline", "", "import cachekit"]  # fmt: skip
    made, name = ("cachekit.demo_pipeline", kind) if kind else ("DiffusionPipeline.from_pretrained", request.model)
    loaded = f"{made}({name!r}{f', torch_dtype=torch.{dtype}' if dtype else ''})"
    arguments = f"num_inference_steps={request.steps}{scale}, generator=generator"
    return "\n".join(
        [
            *imports,
            "",
            f"pipe = {loaded}",
            *([] if device == "cpu" else [f"pipe.to({device!r})"]),
            f"generator = torch.Generator().manual_seed({request.seed})",
            f"with cachekit.apply(pipe, {listed}) as attachment:",
            f"    image = pipe({request.prompt!r}, {arguments})[0][0]",
            "    print(attachment.report())",
            "image.save('out.png')",
            "",
        ]
    )
