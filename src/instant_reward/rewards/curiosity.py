"""Curiosity: rewards for what the run has not written before, and for what a predictor does not know yet.

    rewards:
      - use: instant_reward.rewards.curiosity:Novelty
        args: {n: 3, decay: 0.99}
        weight: 0.05
      - use: instant_reward.rewards.curiosity:RandomDistillation
        args: {model: smollm2-135m, mean: true}
        weight: 0.05

Both remember the run: while a step is sampled they read what they knew when it began, and they learn from its texts
when it is over. What they know goes into checkpoints.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from instant_reward.rewards.language_model import Job, load, load_tokenizer
from instant_reward.rewards.token_values import Change, Cut, Reading, TokenReward, Tokens, TokenScorer, merged
from instant_reward.text import Pieces
from instant_reward.types import Prompt, Rollout, UserError, View

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 256  # how many tokens the predictor learns from at once
_EDGES = re.compile(r"^[\W_]+|[\W_]+$")
Unit = tuple[str, int, int]  # a word or a token, and the characters it covers


@dataclass
class Written:
    """The state of one text: its units, the n-gram that ends at each, what each was paid, how often it has each n-gram.

    Attributes:
        settled: where the words begin that may still change.
        cut: its tokens, where they are the units.
        reading: what a model read of it, where only surprising units are paid.
    """

    units: list[Unit] = field(default_factory=list)
    grams: list[int] = field(default_factory=list)
    paid: list[Change] = field(default_factory=list)
    own: Counter[int] = field(default_factory=Counter)
    settled: int = 0
    cut: Cut = field(default_factory=Cut)
    reading: Reading | None = None

    def forget(self, kept: int) -> list[Change]:
        """Takes all but the first ``kept`` units away; what that takes back."""
        gone = [(-value, start, end) for value, start, end in self.paid[kept:]]
        self.own.subtract(self.grams[kept:])
        del self.units[kept:], self.grams[kept:], self.paid[kept:]
        return gone


class Novelty:
    """How new the text's n-grams are to the run: 1 / sqrt(1 + count) for each, so between 0 and 1 per word or token.

    The count is how often the run wrote the n-gram in earlier steps, and how often this text had it before. The n-gram
    is paid on its last word (``unit`` "word": without case and punctuation at its ends; characters in scripts without
    spaces), or on its last token of the tokenizer of ``model`` (``unit`` "token"). The first words of a text count as
    n-grams that begin with the text. With ``surprising`` only those words are paid that have a token which was not the
    likeliest one for ``model``, a frozen language model: what goes without saying earns nothing. ``mean`` pays each
    piece one number, the mean over its words. With a ``decay`` below 1 the reward shrinks by that factor at each step.

    Cost: a look-up per word; some 150 bytes of memory for each n-gram of the run; with ``surprising`` one pass of the
    model over each token. What games it: rare characters and made-up words, more of them in longer texts (``mean`` with
    ``every: end`` has no such pull); a text that nobody wants is new as well. Keep its weight small and let it decay.

    Source: Strehl and Littman, "An Analysis of Model-Based Interval Estimation" (2008), for the square root; Bellemare
    et al., "Unifying Count-Based Exploration and Intrinsic Motivation" (2016).
    """

    name = "novelty"
    stops = False
    every: Any = "word"
    batched = True
    scope = "run"

    def __init__(
        self,
        n: int = 3,
        unit: str = "word",
        model: str | None = None,
        surprising: bool = False,
        mean: bool = False,
        decay: float = 1.0,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        """Begins with nothing written. UserError where an argument makes no sense, or the model cannot be used."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise UserError(f"{self.name}: n={n!r} must be a whole number above 0")
        if unit not in ("word", "token"):
            raise UserError(f"{self.name}: unit={unit!r} is unknown; use 'word' or 'token'")
        for option, value in {"surprising": surprising, "mean": mean}.items():
            if not isinstance(value, bool):
                raise UserError(f"{self.name}: {option}={value!r} must be true or false")
        if (unit == "token" or surprising) is (model is None):
            raise UserError(f"{self.name}: a model is needed for unit='token' and surprising=True, and only there")
        self.n, self.unit, self.mean, self.decay = n, unit, mean, checked_decay(decay, self.name)
        self.steps = 0
        self._counts: Counter[int] = Counter()
        self._words = Pieces("word")
        self._scorer: TokenScorer | None = None
        self._tokens: Tokens | None = None
        if model is not None and surprising:
            self._scorer = TokenScorer(load(model, dtype, device), _not_likeliest, logits=True, before=True)
            self._tokens = self._scorer.tokens
        elif model is not None:
            self._tokens = Tokens(load_tokenizer(model), model)

    def start(self, prompt: Prompt) -> Written:
        """The state of a text that has just begun."""
        return Written(reading=self._scorer.start(prompt) if self._scorer else None)

    def extend(self, states: Sequence[Written], views: Sequence[View]) -> list[Any]:
        """What each text's newest piece is paid: spans, or with ``mean`` a number; None where it has no word."""
        changed = self._read(states, views)
        found: list[Any] = []
        for state, view, place in zip(states, views, changed, strict=True):
            kept, units = self._units(state, view.text)
            while kept and state.units[kept - 1][2] > place:  # its surprise may have changed
                kept -= 1
                units.insert(0, state.units[kept])
            paid = state.forget(kept)
            for one in units:
                paid.append(self._pay(state, one))
            if self.mean:
                start = len(view.text) - len(view.piece)
                values = [value for value, _, end in state.paid if end > start]
                found.append(sum(values) / len(values) if values else None)
            else:
                found.append([span for span in merged(paid) if span.value])
        return found

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Counts what a step wrote."""
        for rollout in rollouts:
            state = Written()
            if self.unit == "token":
                assert self._tokens is not None
                self._tokens.grow([state.cut], [(rollout.text, True)])
            for one in self._units(state, rollout.text)[1]:
                state.units.append(one)
                self._counts[self._gram(state)] += 1
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain values and tensors."""
        import torch

        grams, counts = list(self._counts), list(self._counts.values())
        numbers = {"grams": torch.tensor(grams, dtype=torch.long), "counts": torch.tensor(counts, dtype=torch.long)}
        return {"steps": self.steps, "n": self.n, "unit": self.unit, **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there. UserError where other n-grams were counted."""
        if (state["n"], state["unit"]) != (self.n, self.unit):
            raise UserError(
                f"{self.name}: the checkpoint counted {state['n']}-grams of {state['unit']}s, and this run's reward "
                f"counts {self.n}-grams of {self.unit}s; go on with the same arguments"
            )
        self.steps = int(state["steps"])
        self._counts = Counter(dict(zip(state["grams"].tolist(), state["counts"].tolist(), strict=True)))

    def _read(self, states: Sequence[Written], views: Sequence[View]) -> list[int]:
        """Brings tokens and what the model says of them up to date; from which character on that changed."""
        grown = [(view.text, view.done) for view in views]
        if self._scorer is not None:
            readings = [state.reading for state in states if state.reading is not None]
            for state, reading in zip(states, readings, strict=True):
                state.cut = reading.cut
            changes = self._scorer.advance(readings, grown)
            return [
                min((start for _, start, _ in change), default=len(text))
                for change, (text, _) in zip(changes, grown, strict=True)
            ]
        if self._tokens is not None:
            self._tokens.grow([state.cut for state in states], grown)
        return [len(text) for text, _ in grown]

    def _units(self, state: Written, text: str) -> tuple[int, list[Unit]]:
        """How many of the text's units are as they were, and the ones after these."""
        if self.unit == "token":
            made = zip(map(str, state.cut.ids), state.cut.spans, strict=True)
            now: list[Unit] = [(key, start, end) for key, (start, end) in made]
            kept = _same(state.units, now)
            return kept, now[kept:]
        settled = bisect_right(state.units, state.settled, key=lambda one: one[2])
        ends = self._words.ends(text, state.settled, done=False)
        cuts = [state.settled, *ends]
        if text[cuts[-1] :].strip():  # the last word, which may not be over
            cuts.append(len(text.rstrip()))
        now = [(_key(text[a:b]), a, b) for a, b in pairwise(cuts)]
        state.settled = ends[-1] if ends else state.settled
        kept = _same(state.units[settled:], now)
        return settled + kept, now[kept:]

    def _pay(self, state: Written, unit: Unit) -> Change:
        state.units.append(unit)
        gram = self._gram(state)
        count = self._counts[gram] + state.own[gram]
        state.own[gram] += 1
        state.grams.append(gram)
        value = self.decay**self.steps / math.sqrt(1 + count) if self._surprises(state.reading, unit) else 0.0
        state.paid.append((value, unit[1], unit[2]))
        return state.paid[-1]

    def _gram(self, state: Written) -> int:
        """A number for the n-gram that ends with the last unit."""
        keys = ["" for _ in range(self.n - len(state.units))] + [key for key, _, _ in state.units[-self.n :]]
        digest = blake2b("\x1f".join(keys).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)

    @staticmethod
    def _surprises(reading: Reading | None, unit: Unit) -> bool:
        if reading is None:
            return True
        first = bisect_right(reading.paid, unit[1], key=lambda token: token[2])
        for surprise, start, _ in reading.paid[first:]:
            if start >= unit[2]:
                break
            if surprise:
                return True
        return False


def _key(word: str) -> str:
    plain = word.strip().casefold()
    return _EDGES.sub("", plain) or plain


def _same(before: Sequence[Unit], now: Sequence[Unit]) -> int:
    return next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))


def _not_likeliest(logits: Tensor, following: Tensor) -> Tensor:
    return (logits.argmax(-1) != following).long()


def checked_decay(decay: float, who: str) -> float:
    """A factor in (0, 1]. UserError for another."""
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0.0 < decay <= 1.0:
        raise UserError(f"{who}: decay={decay!r} must lie above 0 and be at most 1")
    return float(decay)


class RandomDistillation(TokenReward):
    """How little a predictor knows the text: its error on each token, over the running deviation of such errors.
    At least 0, near 0 for what is well known.

    Random network distillation: two small networks read the last hidden state of a frozen ``model`` at each token. One
    is fixed and random; the other learns after each step, on the step's texts, to say what the first says. It errs
    where texts are unlike those it learned from. Hidden states are taken in units of their running deviation and cut at
    5; the first step sets these scales and pays nothing. ``mean`` pays each piece one number, the mean over its tokens.
    With a ``decay`` below 1 the reward shrinks by that factor at each step.

    Cost: one pass of the model over each token while it is written and one after the step. What games it: noise, always
    new and hard to predict, and length (``mean`` with ``every: end`` has no such pull). Keep its weight small and let
    it decay.

    Source: Burda et al., "Exploration by Random Network Distillation" (2019), sections 2.2 and 2.4, with tokens for
    observations; the deviation is that of single errors, not of returns, and there is no second critic.
    """

    name = "random_distillation"
    scope = "run"

    def __init__(
        self,
        model: str = "smollm2-135m",
        mean: bool = False,
        width: int = 128,
        learning_rate: float = 1e-3,
        epochs: int = 1,
        decay: float = 1.0,
        seed: int = 0,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        """Loads the model and makes both networks.

        Args:
            model: a causal language model, as for ``Fluency``.
            width: of the networks' layers and of their outputs.
            learning_rate: of the predictor (Adam).
            epochs: how often the predictor goes over the tokens of a step.
            seed: of both networks' first weights, and of the order of training.
        """
        import torch

        for option, number in {"width": width, "epochs": epochs}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise UserError(f"{self.name}: {option}={number!r} must be a whole number above 0")
        if not isinstance(learning_rate, int | float) or not learning_rate > 0:
            raise UserError(f"{self.name}: learning_rate={learning_rate!r} must be a number above 0")
        frozen = load(model, dtype, device)
        self.frozen, self.epochs, self.seed = frozen, epochs, seed
        self.decay, self.steps = checked_decay(decay, self.name), 0
        scorer = TokenScorer(frozen, lambda states, _: self._novelty(states), logits=False, before=False)
        super().__init__([(scorer, 1.0)], mean)
        size = frozen.model.config.get_text_config().hidden_size
        with torch.random.fork_rng(devices=[]):  # the run's own random numbers stay as they are
            torch.manual_seed(seed)
            self.target = _network([size, width, width]).to(frozen.device).requires_grad_(False)
            self.predictor = _network([size, width, width, width]).to(frozen.device)
        self._optimizer = torch.optim.Adam(self.predictor.parameters(), lr=learning_rate)
        self._inputs, self._errors = Running(size), Running(1)

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Learns from what a step wrote."""
        import torch

        (scorer, _), jobs = self.scorers[0], []
        readings = [scorer.start(rollout.prompt) for rollout in rollouts]
        scorer.tokens.grow([reading.cut for reading in readings], [(rollout.text, True) for rollout in rollouts])
        for reading in readings:
            ids = reading.prompt + reading.cut.ids
            jobs.append(Job(reading.memory, ids, len(reading.prompt), len(ids)))
        states = [made for made in self.frozen.read(jobs, lambda states, _: states.float(), logits=False) if len(made)]
        self.steps += 1
        if not states:
            return
        everything = torch.cat(states)
        self._inputs.add(everything)
        inputs = self._scaled(everything.to(self.frozen.device))
        with torch.no_grad():
            self._errors.add(self._error(inputs).cpu()[:, None])
        draw = torch.Generator().manual_seed(self.seed + self.steps)
        for _ in range(self.epochs):
            order = torch.randperm(len(inputs), generator=draw).to(inputs.device)
            for first in range(0, len(order), _BATCH):
                self._learn(inputs[order[first : first + _BATCH]])

    def _learn(self, inputs: Tensor) -> None:
        """One update of the predictor."""
        import torch

        with torch.enable_grad():
            self._optimizer.zero_grad()
            loss: Any = self._error(inputs).mean()
            loss.backward()
            self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Both networks, the optimizer and the running deviations."""
        return {
            "steps": self.steps,
            "target": self.target.state_dict(),
            "predictor": self.predictor.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "inputs": self._inputs.state_dict(),
            "errors": self._errors.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there. UserError where the networks had another size."""
        try:
            self.target.load_state_dict(state["target"])
            self.predictor.load_state_dict(state["predictor"])
        except RuntimeError as error:
            raise UserError(
                f"{self.name}: the checkpoint's networks have another size; go on with the same model and width"
            ) from error
        self._optimizer.load_state_dict(state["optimizer"])
        self._inputs.load_state_dict(state["inputs"])
        self._errors.load_state_dict(state["errors"])
        self.steps = int(state["steps"])

    def _novelty(self, states: Tensor) -> Tensor:
        """The value of each token, out of its hidden state."""
        if not self._errors.count:
            return states.new_zeros(len(states))
        error = self._error(self._scaled(states.float()))
        deviation = max(float(self._errors.deviation()), 1e-8)
        return error * (self.decay**self.steps / deviation)

    def _scaled(self, states: Tensor) -> Tensor:
        mean, deviation = self._inputs.mean.to(states), self._inputs.deviation().to(states)
        return ((states - mean) / deviation.clamp(min=1e-6)).clamp(-5.0, 5.0)

    def _error(self, inputs: Tensor) -> Tensor:
        """The mean squared error at each input, ``[n]``."""
        error: Tensor = (self.predictor(inputs) - self.target(inputs)).square().mean(-1)
        return error


def _network(sizes: Sequence[int]) -> Any:
    """Linear layers with a ReLU between them."""
    from torch.nn import Linear, ReLU, Sequential

    layers: list[Any] = []
    for before, after in pairwise(sizes):
        layers += [Linear(before, after), ReLU()]
    return Sequential(*layers[:-1])


class Running:
    """Mean and deviation of all rows that were added, in float64 (Chan, Golub and LeVeque's update)."""

    def __init__(self, size: int) -> None:
        import torch

        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self._squares = torch.zeros(size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Rows ``[n, size]``."""
        rows = rows.double()
        mean, count = rows.mean(0), len(rows)
        apart, total = mean - self.mean, self.count + count
        self._squares += (rows - mean).square().sum(0) + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def deviation(self) -> Tensor:
        """Of each column; 0 before anything was added."""
        return (self._squares / max(1, self.count)).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """The numbers it keeps."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.count, self.mean, self._squares = int(state["count"]), state["mean"].clone(), state["squares"].clone()
