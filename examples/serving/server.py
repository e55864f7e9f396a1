"""A server whose requests choose how much to cache: `uvicorn --app-dir examples/serving server:app`."""

import copy
import io
import threading
from typing import Annotated, Any, Literal

import torch
from fastapi import FastAPI, HTTPException, Query, Response

import cachekit

pipe = cachekit.demo_pipeline()  # or any pipeline that you have loaded
attachment = cachekit.apply(pipe, "forecast:interval=2")
# Names, not specs: a spec may name a file of the server.
SPECS = {"full": [], "fast": "forecast:interval=2", "draft": "calibrated:interval=4"}
GUIDANCE = 4  # calibrations are for some guidance scales
Quality, Steps = Literal["full", "fast", "draft"], Annotated[int, Query(ge=1, le=50)]
app, local = FastAPI(), threading.local()


def own_pipeline() -> Any:
    """Get this thread's pipeline: all of them share the models, but a scheduler or tokenizer serves one at a time."""
    if not hasattr(local, "pipe"):
        local.pipe = copy.copy(pipe)
        for name, part in pipe.components.items():
            if not isinstance(part, torch.nn.Module):
                setattr(local.pipe, name, copy.deepcopy(part))
    return local.pipe


@app.get("/image")
def draw(prompt: str, quality: Quality = "fast", steps: Steps = 25, seed: int = 0) -> Response:
    """Draw an image as PNG; headers have what it cost."""
    png, given = io.BytesIO(), {"num_inference_steps": steps, "guidance_scale": GUIDANCE}
    try:
        with attachment.using(SPECS[quality]) as block:
            own_pipeline()(prompt, generator=torch.Generator().manual_seed(seed), **given).images[0].save(png, "PNG")
    except cachekit.CachekitError as error:
        raise HTTPException(422, str(error)) from None
    costs = {"X-Denoiser-Calls": str(block.report().calls), "X-Seconds": f"{block.report().seconds:.3f}"}
    return Response(png.getvalue(), media_type="image/png", headers=costs)
