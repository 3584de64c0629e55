"""A reward that sees a picture: words are paid for how well they fit the image that comes with the prompt.

    python recipes/image_words.py

A reward reads the columns of the data from ``view.info``: here ``image``, a path or a PIL image. The scorer is a small
one shaped like CLIP, trained on the spot on drawn pictures of coloured shapes, and the policy a tiny model that starts
from nothing; half a minute on a CPU. The policy does not see the picture: its prompt holds a code for it ("KC SA"),
and what the codes mean it can learn from the reward alone. From a config, with the folder that this program wrote:

    data: {path: prompts.jsonl}          # {"prompt": ..., "image": "pictures/one.png"}
    rewards:
      - use: recipes/image_words.py:ImageWords
        args: {scorer: runs/image-words/scorer}

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021); its loss, right
or wrong for each pair, is that of Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023).
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import instant_reward as ir
from instant_reward.types import Prompt, UserError

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 210, 50)}
SHAPES = ("circle", "square", "triangle")
WORDS = (*COLOURS, *SHAPES)
CODES = dict(zip(WORDS, ("KA", "KB", "KC", "KD", "SA", "SB", "SC"), strict=True))
KINDS = list(itertools.product(COLOURS, SHAPES))
SIZE = 32


def draw(colour: str, shape: str, seed: int) -> Image.Image:
    """A picture of one shape, of random size and place, on a light or dark ground with some noise."""
    chance = random.Random(f"{colour} {shape} {seed}")
    ground = chance.choice([245, 30]) + chance.randint(-15, 10)
    picture = Image.new("RGB", (SIZE, SIZE), (ground, ground, ground))
    half = chance.randint(7, 11)
    x, y = (SIZE // 2 + chance.randint(-3, 3) for _ in range(2))
    colours = tuple(part + chance.randint(-18, 18) for part in COLOURS[colour])
    pen, box = ImageDraw.Draw(picture), (x - half, y - half, x + half, y + half)
    if shape == "circle":
        pen.ellipse(box, fill=colours)
    elif shape == "square":
        pen.rectangle(box, fill=colours)
    else:
        pen.polygon([(x - half, y + half), (x + half, y + half), (x, y - half)], fill=colours)
    noise = np.random.default_rng(chance.randint(0, 2**32)).integers(-12, 13, (SIZE, SIZE, 3))
    return Image.fromarray((np.asarray(picture).astype(int) + noise).clip(0, 255).astype(np.uint8))


class Scorer(nn.Module):
    """Two towers into one space, an image by a few convolutions and a word by its vector, and how well they fit."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (SIZE // 8) ** 2, width),
        )
        self.words = nn.Embedding(len(WORDS), width)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.shift = nn.Parameter(torch.tensor(-1.0))

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """``[N, width]``, of length 1."""
        arrays = [np.asarray(picture.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32) for picture in pictures]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1.0
        return nn.functional.normalize(self.image(pixels.to(self.scale.device)), dim=-1)

    def logits(self, images: Tensor) -> Tensor:
        """``[N, words]``: how sure it is of each word, for images as vectors."""
        words = nn.functional.normalize(self.words.weight, dim=-1)
        return self.scale.exp() * images @ words.T + self.shift

    def fits(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """``[N]``: each different word of a text that it knows counts, from 1 (surely right) to -1 (surely wrong)."""
        said = [set(re.findall("[a-z]+", text.lower())) for text in texts]
        there = torch.tensor([[word in words for word in WORDS] for words in said], device=images.device)
        return (torch.tanh(self.logits(images) / 2) * there).sum(dim=-1)  # tanh(x / 2) is 2 sigmoid(x) - 1

    def fit(self, steps: int = 600, seed: int = 0) -> Scorer:
        """Trains both towers: every batch has a picture of each kind, and each word is right or wrong for each."""
        optimizer = torch.optim.Adam(self.parameters(), lr=4e-3)
        target = torch.tensor([[float(word in kind) for word in WORDS] for kind in KINDS])
        for step in range(steps):
            images = self.images([draw(*kind, seed=1000 * (seed + 1) + step) for kind in KINDS])
            loss = nn.functional.binary_cross_entropy_with_logits(self.logits(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self.eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Writes the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "scorer.pt")

    @classmethod
    def load(cls, folder: Path) -> Scorer:
        """What ``save`` wrote."""
        if not (folder / "scorer.pt").is_file():
            raise UserError(f"ImageWords: there is no scorer in {folder}; run recipes/image_words.py first")
        scorer = cls()
        scorer.load_state_dict(torch.load(folder / "scorer.pt", weights_only=True))
        return scorer.eval().requires_grad_(False)


class ImageWords:
    """What each word adds to the fit of text and image: a right word about 1, a wrong one about -1, others nothing.

    Over a text between minus and plus the number of words that the scorer knows. Cost: the image once for each text,
    then one small product for each word, in batches. What games it: the right words in any order, and nothing else; a
    word said twice counts once. Source: as the program.
    """

    name = "image_words"
    every = "word"
    batched = True

    def __init__(self, scorer: str | Path | Scorer, column: str = "image", device: str = "cpu") -> None:
        """Takes a scorer, or the folder of one; ``column`` is the data's column with the path or image."""
        self.scorer = (scorer if isinstance(scorer, Scorer) else Scorer.load(Path(scorer))).to(device)
        self.column = column

    def start(self, prompt: Prompt) -> list[Any]:
        """The state of a text: its image's vector, and the fit so far."""
        with torch.inference_mode():
            return [self.scorer.images([self._opened(prompt)])[0], 0.0]

    def extend(self, states: Sequence[list[Any]], views: Sequence[ir.View]) -> list[float]:
        """How much the fit rose with the newest word of each text."""
        with torch.inference_mode():
            images = torch.stack([image for image, _ in states])
            fits = self.scorer.fits(images, [view.text for view in views]).tolist()
        rises = [fit - state[1] for state, fit in zip(states, fits, strict=True)]
        for state, fit in zip(states, fits, strict=True):
            state[1] = fit
        return rises

    def _opened(self, prompt: Prompt) -> Image.Image:
        found = prompt.info.get(self.column)
        if isinstance(found, Image.Image):
            return found
        if not isinstance(found, str | Path):
            raise UserError(f"ImageWords: prompt {prompt.id} has no image in column {self.column!r}; give a path")
        try:
            with Image.open(found) as picture:
                return picture.convert("RGB")
        except OSError as error:  # no such file, or no picture
            raise UserError(f"ImageWords: the image {found} cannot be read ({error}); check it") from error


def tiny_policy(folder: Path) -> Path:
    """A model of 48,000 random weights that knows a few words; each is one token with the space before it."""
    names = ["<end>", "Picture", *(f"Ġ{word}" for word in (*WORDS, *CODES.values())), ":"]
    backend = Tokenizer(tokenizer_models.WordLevel({name: number for number, name in enumerate(names)}, "<end>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,  # larger than usual: it learns from nothing, and soon must tell the codes apart
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    return folder


def pictured(folder: Path, each: int = 4) -> list[dict[str, str]]:
    """So many prompts for each kind of picture, each with a picture of its own and the picture's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for (colour, shape), seed in itertools.product(KINDS, range(each)):
        path = folder / f"{colour}-{shape}-{seed}.png"
        draw(colour, shape, seed).save(path)
        prompt = f"Picture {CODES[colour]} {CODES[shape]}:"
        rows.append({"prompt": prompt, "image": str(path), "names": f"{colour} {shape}"})
    return rows


def right(rollouts: Sequence[ir.Rollout]) -> float:
    """The share of texts that name the colour and the shape of their picture, and no other."""
    named = [{word for word in one.text.split() if word in WORDS} for one in rollouts]
    return sum(names == set(one.info["names"].split()) for names, one in zip(named, rollouts, strict=True)) / len(named)


def main(arguments: Sequence[str] | None = None) -> float:
    """Trains scorer and policy; returns the share of right texts afterwards."""
    parser = argparse.ArgumentParser(description="Teach a tiny model to name what a picture shows.")
    parser.add_argument("--out", type=Path, default=Path("runs/image-words"))
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    scorer = Scorer().fit()
    scorer.save(options.out / "scorer")
    rows = pictured(options.out / "pictures")
    run = ir.train(
        model=str(tiny_policy(options.out / "model")),
        prompts=rows,
        rewards=[ImageWords(scorer)],
        algorithm={"name": "rloo", "scale": "batch"},
        steps=options.steps,
        prompts_per_step=12,
        group_size=16,
        max_new_tokens=3,
        learning_rate=2e-3,
        dtype="float32",
        out=options.out / "run",
    )
    texts = run.policy.sample(rows, per_prompt=4, max_new_tokens=3, seed=1)
    for one in texts[::16]:
        print(f"{one.prompt.text} {one.text.strip()}   (its picture shows: {one.info['names']})")
    print(f"{100 * right(texts):.0f} % name the colour and the shape, and no other.")
    return right(texts)


if __name__ == "__main__":
    main()
