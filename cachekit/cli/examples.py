"""Examples in the help of each command."""

from __future__ import annotations

__all__ = ["EXAMPLES", "LINES"]

#: The examples of each command, without the name of the program.
LINES: dict[str, tuple[str, ...]] = {
    "list": ("list", "list --json -"),
    "show": ("show tgate", "show every"),
    "sites": ("sites sdxl", "sites ./my-pipeline --verbose"),
    "plan": ("plan tgate:m=10 deepcache:interval=3 --steps 25", "plan preset:sd15-deepcache-3 --steps 50 --model sd15"),
    "estimate": ("estimate sdxl tgate:m=10 --steps 25", "estimate flux fbcache --json -"),
    "recommend": ("recommend sdxl", "recommend ./my-pipeline --steps 30"),
    "generate": (
        'generate demo "a large red circle top left on white" --spec tgate:m=10',
        "generate ./my-pipeline --prompts prompts.txt --output images --spec deepcache:interval=3",
        "generate ./my-pipeline --prompts rows.jsonl --output images --executor ray --workers 4",
    ),
    "demo": ("demo", "demo --captions 4 --steps 12 --spec tgate:m=5+deepcache:interval=2"),
    "app": ("app demo", "app ./my-pipeline --port 8000"),
    "analyze": ("analyze demo --captions 24", "analyze ./my-pipeline --captions captions.txt --only changes"),
    "calibrate": ("calibrate ./my-pipeline --spec calibrated:interval=4 --prompts prompts.txt --steps 25",),
    "tune": ("tune demo --at-least 35dB --trials 20", "tune ./my-pipeline --captions captions.txt --speedup 2"),
    "check": ("check deepcache:interval=2", "check tgate:m=3+deepcache --model sd --json -"),
    "coverage": ("coverage Flux", "coverage SD3 --spec deepcache"),
    "new-policy": ("new-policy my_policy", "new-policy my_steps --schedule"),
    "new-adapter": ("new-adapter mixers",),
    "doctor": ("doctor",),
    "bench grid": (
        'bench grid demo --spec "tgate:m=5|10+deepcache:interval=2|3" --html report.html',
        'bench grid demo --best "PSNR>=35"',
    ),
    "bench coco": (
        "bench coco ./my-pipeline --captions captions.txt --metric clip=clip-folder --spec tgate:m=10",
        "bench coco ./images --references photographs --metric fid=inception.pt",
    ),
    "bench paper": ("bench paper", "bench paper sd15 sdxl"),
}
#: The end of each command's help, with a line for each example.
EXAMPLES = {
    name: "\n\n".join(["Examples:" if len(lines) > 1 else "Example:", *(f"cachekit {line}" for line in lines)])
    for name, lines in LINES.items()
}
