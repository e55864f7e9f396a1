"""Build the components of pipelines small: models with seeded weights, schedulers, tokenizers and processors."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from cachekit.errors import CachekitError
from cachekit.tools.coverage.facts import class_notes, model_config

#: First tokens of every tokenizer, before the bytes. The end token isn't at 2, which CLIP takes for its older format.
SPECIAL_TOKENS = (
    *("<pad>", "<s>", "<unk>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<image>", "<mask>"),
)
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if 'text' in c %}{{ c['text'] }}{% else %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class NotBuiltError(CachekitError):
    """A pipeline that can't be built small from its configuration alone."""


class NoGuard:
    """Stand-in for a guardrail model that finds every text and video safe."""

    def to(self, *args: Any, **kwargs: Any) -> NoGuard:
        """Ignore the device and dtype."""
        return self

    def check_text_safety(self, text: str) -> bool:
        """Accept every text."""
        return True

    def check_video_safety(self, video: Any) -> Any:
        """Accept every video, unchanged."""
        return video


def make(wanted: dict[str, Any], annotated: type[Any] | None = None) -> Any:
    """Build a component: `use` names its class or class/variant, and all else changes its configuration."""
    changes = dict(wanted)
    name = changes.pop("use", annotated.__name__ if annotated else "")
    known = annotated is not None and annotated.__name__ == name.partition("/")[0]
    cls = annotated if annotated is not None and known else find_class(name)
    return make_one(cls, name, changes)


def make_one(cls: type[Any], name: str, changes: dict[str, Any]) -> Any:
    """Build an instance of `cls` from the small configuration `name`, with `changes`.

    Raises `NotBuiltError` where a package or the configuration is missing.
    """
    needed = class_notes(name).get("needs")
    if needed and find_spec(needed) is None:
        raise NotBuiltError(f"needs {needed}")
    is_model = isinstance(cls, type) and issubclass(cls, nn.Module)
    if not is_model and _is_tokenizer(cls):
        return tokenizer(**changes)
    config = model_config(name)
    if config is None and not _is_scheduler(cls):
        raise NotBuiltError(f"no small configuration for {name}")
    settings = {key: _setting(value) for key, value in {**(config or {}), **changes}.items()}
    if is_model:
        return _model(cls, settings)
    return _processor(cls, settings) if "tokenizer" in settings else cls(**settings)


def find_class(name: str) -> type[Any]:
    """Find a class of diffusers or transformers by the name of one of its configurations.

    Raises `NotBuiltError` where neither has it.
    """
    notes, cls = class_notes(name), name.partition("/")[0]
    for place in [notes["from"]] if "from" in notes else ["diffusers", "transformers"]:
        found = getattr(importlib.import_module(place), cls, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise NotBuiltError(f"neither diffusers nor transformers has {cls}")


def tokenizer(limit: int = 77, **changes: Any) -> Any:
    """Build a tokenizer whose tokens are bytes, so that no text is empty or unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 3)]
    )
    named = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=limit,
        additional_special_tokens=list(SPECIAL_TOKENS[4:-1]),
        chat_template=_CHAT,
        **{**named, **changes},
    )
    for token in ("image", "video", "vision_start", "vision_end"):
        word = f"<|{token}_pad|>" if token in ("image", "video") else f"<|{token}|>"
        setattr(made, f"{token}_token", word)
        setattr(made, f"{token}_token_id", words.index(word))
    return made


def seed_weights(model: nn.Module, seed: int = 0) -> None:
    """Initialise all weights at random, so that no layer is zero and each one matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() > 1 and parameter.numel():
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(noise * 0.05)


def _setting(value: Any) -> Any:
    """Build the component that a configuration has for a value."""
    return make(value) if isinstance(value, dict) and "use" in value else value


def _model(cls: Any, settings: dict[str, Any]) -> nn.Module:
    config = getattr(cls, "config_class", None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(**settings) if config is None else cls(config(**settings))
    return model.eval()  # type: ignore[no-any-return]


def _processor(cls: Any, settings: dict[str, Any]) -> Any:
    """Build a processor of texts and images without its processor of videos, which needs torchvision."""

    def check(self: Any, name: str, part: Any) -> Any:
        return None if part is None else cls.check_argument_for_proper_class(self, name, part)

    partial = type(cls.__name__, (cls,), {"check_argument_for_proper_class": check})
    return partial(**settings, chat_template=settings["tokenizer"].chat_template)


def _is_tokenizer(cls: Any) -> bool:
    name = getattr(cls, "__name__", str(cls))
    return "Tokenizer" in name or name in ("PythonBackend", "TokenizersBackend", "PreTrainedTokenizerBase")


def _is_scheduler(cls: Any) -> bool:
    return getattr(cls, "__name__", "").endswith(("Scheduler", "Guidance"))
