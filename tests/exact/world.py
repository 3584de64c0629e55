"""A world small enough to count: three tokens, texts of at most four, every text enumerated, in float64.

A policy is one free row of logits for each prefix. Expectations are sums weighted by probability, so a gradient
estimator is compared with the gradient of what it estimates to the last digits. Estimators are built from the
library's own functions: a live ``Watch`` makes the marks, ``collate`` the batch, ``credit_batch`` the
advantages, ``losses`` the loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from itertools import combinations_with_replacement, permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from instant_reward import losses
from instant_reward.batch import Batch, collate
from instant_reward.credit import Marks, Source
from instant_reward.crediting import credit_batch
from instant_reward.presets import Preset
from instant_reward.rewards.base import as_rewards
from instant_reward.rewards.watch import Watch
from instant_reward.text import TextDecoder
from instant_reward.types import Every, LossOutput, Prompt, Rollout

LONGEST = 4
END = 2
PROMPT = Prompt(id="p", text="?", token_ids=[0, 1])  # two tokens, so that an index off by one is seen
EXACT = 1e-10
# The two alphabets: in the first a blank is a token of its own, and a word has ended for sure with the letter after
# it; in the second a blank leads its token, which ends the word before. In both a word may have several tokens.
ALPHABETS = [("a", " "), ("a", " b")]

Credit = Callable[[Batch], Batch]
Loss = Callable[[Tensor, Batch], LossOutput]

PLAIN = Preset("to_go", "none", "none", "policy_gradient", "text")
REINFORCE: Credit = partial(credit_batch, preset=PLAIN)


class Letters:
    """The tokenizer: two visible tokens and the end token, which shows nothing."""

    all_special_ids = (END,)

    def __init__(self, first: str, second: str) -> None:
        self._tokens = [first, second, ""]

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return "".join(self._tokens[token] for token in token_ids)

    def __len__(self) -> int:
        return len(self._tokens)


class World:
    """All texts of up to ``LONGEST`` tokens: those that end, and those that are cut off.

    Attributes:
        texts: their sampled tokens.
        logits: float64 ``[prefixes, 3]``, the policy.
    """

    def __init__(self, alphabet: tuple[str, str] = ("a", " "), seed: int = 0) -> None:
        self.letters = Letters(*alphabet)
        self.decoder = TextDecoder(self.letters)
        self.texts = list(_texts())
        prefixes = sorted({tuple(text[:count]) for text in self.texts for count in range(len(text))})
        self.row_of = {prefix: row for row, prefix in enumerate(prefixes)}
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(len(prefixes), 3, generator=generator, dtype=torch.float64))

    def logprobs(self, logits: Tensor | None = None) -> Tensor:
        """``[texts, prompt + LONGEST]`` with gradient; where nothing was sampled stands what must never be read."""
        table = (self.logits if logits is None else logits).log_softmax(-1)
        first = len(PROMPT.token_ids)
        junk = 3.0 * table.sum()
        rows = []
        for text in self.texts:
            sampled = [table[self.row_of[tuple(text[:t])], token] for t, token in enumerate(text)]
            rows.append([junk] * first + sampled + [junk] * (LONGEST - len(text)))
        return torch.stack([torch.stack(row) for row in rows])

    @cached_property
    def mask(self) -> Tensor:
        """``[texts, prompt + LONGEST]``: what was sampled."""
        first = len(PROMPT.token_ids)
        return torch.tensor([[0] * first + [1] * len(t) + [0] * (LONGEST - len(t)) for t in self.texts]).bool()

    def probabilities(self) -> Tensor:
        """``[texts]`` with gradient; they sum to 1."""
        return torch.where(self.mask, self.logprobs(), 0.0).sum(1).exp()

    def gradient(self, values: Tensor | Sequence[float]) -> Tensor:
        """The gradient of the enumerated objective, the sum of ``p(x) * values[x]``, by autograd."""
        values = torch.as_tensor(values, dtype=torch.float64)
        return _gradient((self.probabilities() * values).sum(), self.logits)

    def rollouts(self, rewards: Sequence[Any]) -> list[Rollout]:
        """Every text, scored token by token by a live watch, as the decoding engine does it."""
        watch = Watch(rewards, self.decoder)
        logprobs = self.logprobs().detach()
        return [self._rollout(watch, number, logprobs[number]) for number in range(len(self.texts))]

    def _rollout(self, watch: Watch, number: int, logprobs: Tensor) -> Rollout:
        text, first = self.texts[number], len(PROMPT.token_ids)
        watch.open(number, PROMPT)
        for t, token in enumerate(text):
            watch.feed(number, [token], done=t == len(text) - 1)
        characters, char_ends, marks = watch.close(number)
        return Rollout(
            id=f"p/{number}",
            group=number,
            prompt=PROMPT,
            token_ids=[*PROMPT.token_ids, *text],
            mask=[False] * first + [True] * len(text),
            logprobs=[0.0] * first + logprobs[first : first + len(text)].tolist(),
            char_ends=char_ends,
            text=characters,
            marks=marks,
            versions=[-1] * first + [0] * len(text),
            stop="ended" if text[-1] == END else "length",
        )

    def expected_step(
        self,
        rewards: Sequence[Any],
        credit: Credit = REINFORCE,
        loss: Loss = losses.policy_gradient,
        siblings: int = 1,
        marks: Callable[[Rollout], Rollout] = lambda rollout: rollout,
        *,
        sampler: World | None = None,
        pieces: Every | None = None,
        apart: bool = False,
    ) -> Tensor:
        """The expected direction of a step: less the expected gradient of the loss of one group of ``siblings``.

        All groups go through ``credit`` in one batch (what a group gets must not depend on the others), and each
        through the loss on its own, weighted by its probability.

        Args:
            marks: changes rollouts before they are credited, to build something wrong on purpose.
            sampler: who writes the texts; the policy itself where nobody is named.
            pieces: where pieces end, where they are the actions.
            apart: each group is a batch of its own, for credit that compares all texts of a batch.
        """
        named = as_rewards(rewards)
        sources = [Source(one.name, one.weight, 1.0 if one.discount is None else one.discount, one.at) for one in named]
        writer = self if sampler is None else sampler
        rollouts = [marks(rollout) for rollout in writer.rollouts(named)]
        groups = list(combinations_with_replacement(range(len(self.texts)), siblings))
        # Every other group the other way round, so that nothing hangs on which of its texts comes first.
        groups = [group[::-1] if number % 2 else group for number, group in enumerate(groups)]
        # Siblings apart from each other, so that nothing hangs on their order.
        chosen = [(group, members[place]) for place in range(siblings) for group, members in enumerate(groups)]
        numbered = [replace(rollouts[text], group=group) for group, text in chosen]
        batch = collate(numbered, sources, dtype=torch.float64, pieces=pieces)
        batch = batch if apart else credit(batch)
        logprobs, weights = self.logprobs(), writer.probabilities().detach()
        total = torch.zeros((), dtype=torch.float64)
        for number, members in enumerate(groups):
            rows = [place * len(groups) + number for place in range(siblings)]
            part = batch.select(rows)
            if apart:
                part = credit(replace(part, marks=_of_rows(part.marks, rows)))
            part = replace(part, text_count=siblings, token_count=int(part.mask.sum()))
            width = part.token_ids.shape[1]
            orders = len(set(permutations(members)))
            total = total + orders * weights[list(members)].prod() * loss(logprobs[list(members), :width], part).loss
        return -_gradient(total, self.logits)


def _texts() -> Iterator[list[int]]:
    for length in range(1, LONGEST + 1):
        for prefix in product(range(END), repeat=length - 1):
            yield [*prefix, END]
    for text in product(range(END), repeat=LONGEST):
        yield list(text)


def _of_rows(marks: Marks, rows: Sequence[int]) -> Marks:
    """The marks of these rows alone, which come to stand in this order."""
    chosen = [index for index, row in enumerate(marks.row.tolist()) if row in rows]
    taken = {one.name: getattr(marks, one.name)[chosen] for one in fields(marks)}
    taken["row"] = torch.tensor([rows.index(row) for row in taken["row"].tolist()], dtype=torch.long)
    return Marks(**taken)


def _gradient(scalar: Tensor, parameter: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(scalar, parameter, allow_unused=True)
    return torch.zeros_like(parameter) if gradient is None else gradient


def chance(text: str) -> float:
    """A score without any pattern, the same for the same text; the empty text has one too."""
    return random.Random(f"score of {text!r}").uniform(-1.0, 1.0)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to ten digits."""
    return bool((one.detach() - other.detach()).abs().max() <= EXACT)


def differ(one: Tensor, other: Tensor) -> bool:
    """Plainly unequal: no matter of rounding. A hundredth of the longer one's length, or more."""
    one, other = one.detach(), other.detach()
    return bool((one - other).norm() >= 0.01 * max(float(one.norm()), float(other.norm())) > 0.0)


def angle_differs(one: Tensor, other: Tensor) -> bool:
    """Whether the two point in different directions, whatever their lengths."""
    cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
    return bool(cosine < 0.9999)
