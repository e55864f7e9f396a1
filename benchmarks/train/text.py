"""Build the tokenizer, and pretrain the text encoder to classify each phrase before the UNet needs it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cachekit.models.demo import scenes

MAX_TOKENS = 28
WIDTH = 96
START, END = "<|startoftext|>", "<|endoftext|>"
ASPECTS: dict[str, tuple[str, ...]] = {
    "size": tuple(scenes.SIZES),
    "fill": scenes.FILLS,
    "colour": tuple(scenes.COLOURS),
    "shape": scenes.SHAPES,
    "place": scenes.PLACES,
}


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """List byte-pair merges that build each word from its left, earlier words first."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(symbols)):
            merges[("".join(symbols[:end]), symbols[end])] = None
    return list(merges)


def _tokenizer(words: list[str]) -> CLIPTokenizer:
    merges = _merges(words)
    symbols = {f"{word}</w>" for word in words}.union(*merges, map("".join, merges))
    vocab = {symbol: index for index, symbol in enumerate([*sorted(symbols), START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_tokenizer() -> CLIPTokenizer:
    """Build a tokenizer with one token for each word of a caption.

    A word that the merges of others split wrongly moves to the front, until there is none.
    """
    words = list(scenes.vocabulary())
    for _ in range(200):
        tokenizer = _tokenizer(words)
        split = [word for word in words if len(tokenizer(word)["input_ids"]) != 3]
        if not split:
            return tokenizer
        words = split + [word for word in words if word not in split]
    raise RuntimeError(f"no order of merges keeps {', '.join(split)} whole")


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the untrained text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Convert captions to n x 28 tokens, padded as the pipeline pads them."""
    encoded = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def targets(captions: list[str]) -> tuple[Tensor, Tensor]:
    """Convert captions to class labels.

    Returns m x 7 things (index of the caption, position of the phrase's last token, the five aspects) and n
    backgrounds.
    """
    rows, backgrounds = [], []
    for index, text in enumerate(captions):
        scene = scenes.parse(text)
        position = 0
        for thing in scene.things:
            position += len(str(thing).split())
            rows.append([index, position, *(options.index(getattr(thing, name)) for name, options in ASPECTS.items())])
            position += 1
        backgrounds.append(tuple(scenes.BACKGROUNDS).index(scene.background))
    return torch.tensor(rows), torch.tensor(backgrounds)


class Heads(nn.Module):
    """Classifiers of every aspect from a phrase's last token, and of everything by place from the caption's last."""

    def __init__(self) -> None:
        """Create linear heads, so that the encoder has to do the work."""
        super().__init__()
        self.counts = [len(options) for options in ASPECTS.values()]
        self.phrase = nn.Linear(WIDTH, sum(self.counts))
        self.whole = nn.Linear(WIDTH, len(scenes.PLACES) * sum(self.counts))
        self.background = nn.Linear(WIDTH, len(scenes.BACKGROUNDS))

    def forward(self, hidden: Tensor, things: Tensor, backgrounds: Tensor) -> Tensor:
        """Compute the mean cross entropy of n x 28 x 96 `hidden` states against `targets`."""
        rows, positions, aspects = things[:, 0], things[:, 1], things[:, 2:]
        phrase = self.phrase(hidden[rows, positions])
        places = self.whole(hidden[:, -1]).view(len(hidden), len(scenes.PLACES), -1)
        whole = places[rows, aspects[:, -1]]
        loss = functional.cross_entropy(self.background(hidden[:, -1]), backgrounds)
        for number, (a, b) in enumerate(zip(phrase.split(self.counts, 1), whole.split(self.counts, 1), strict=True)):
            loss = (
                loss + functional.cross_entropy(a, aspects[:, number]) + functional.cross_entropy(b, aspects[:, number])
            )
        return loss / (1 + 2 * len(self.counts))


def pretrain(work: Path, seconds: float, batch: int = 64) -> None:
    """Train the text encoder alone for `seconds`, and write it, its heads and the tokenizer to `work`."""
    torch.manual_seed(2)
    tokenizer = build_tokenizer()
    encoder, heads = build_encoder(tokenizer), Heads()
    both = nn.ModuleList([encoder, heads])
    optimiser = torch.optim.AdamW(both.parameters(), lr=1e-3, weight_decay=1e-4)
    source = scenes.scenes(np.random.default_rng(2), heldout=False)
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        captions = [scenes.caption(next(source)) for _ in range(batch)]
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * min(1, 2 * (1 - done))
        loss = heads(encoder(tokenize(tokenizer, captions)).last_hidden_state, *targets(captions))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        step += 1
        done = (time.monotonic() - start) / seconds
        if step % 100 == 0:
            print(f"text step {step} at {100 * done:.0f} %: loss {loss.item():.4f}", flush=True)
    encoder.save_pretrained(work / "text_encoder")
    tokenizer.save_pretrained(work / "tokenizer")
    torch.save(heads.state_dict(), work / "heads.pt")
    (work / "text.json").write_text(json.dumps({"steps": step, "loss": loss.item()}))
