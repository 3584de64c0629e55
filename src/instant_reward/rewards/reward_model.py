"""Reward models: trained networks that rate a whole text, each of its steps, or each of its tokens.

rewards:
  - use: instant_reward.rewards.reward_model:RewardModel
    args: {model: folder-of-a-reward-model, dtype: bfloat16}
  - use: instant_reward.rewards.reward_model:StepRewardModel
    args: {model: folder-of-a-causal-model, good: " +", bad: " -", separator: " ки", between: "\\n"}
    every: line
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from instant_reward import models
from instant_reward.rewards.language_model import Frozen, Job, Measure, Memory, exact, load
from instant_reward.rewards.token_values import TokenReward, Tokens, TokenScorer, as_prompt, clean, plain_text
from instant_reward.types import Message, Prompt, UserError, View

if TYPE_CHECKING:
    from torch import Tensor

_TOGETHER = 32  # how many texts a model without a direction reads at once


@dataclass
class Rated:
    """The state of one text: its prompt, what was read of it, and its score at the last piece (None: not yet)."""

    prompt: Prompt
    memory: Memory
    before: float | None = None


class RewardModel:
    """What a reward model says of the whole text so far: the one output of a sequence classifier. Any number.

    For models that transformers loads as ``AutoModelForSequenceClassification`` with one output. They read prompt and
    text in a row; a chat prompt and the text as its reply, with the model's own chat template, where it has one. A
    model that reads in both directions gets prompt and text as a pair. ``change`` pays each piece
    ``score(now) - score(before)``, from the score of the empty text on, so that the sum is ``score(full) - score("")``;
    without, each piece is paid the score of the text so far. What is beyond the model's context is left out at the
    beginning.

    Cost: with a model that reads from left to right, one pass over each token whatever ``every`` is (and over the end
    of the turn after each piece); one that reads in both directions reads prompt and text again at each piece. All
    texts of one call are read together.

    What games it: what its training data rewarded by the way: length, lists, flattery, confidence; the further the
    policy leaves those data, the less the score means. Keep a reference KL and a held-out reward beside it.

    Source: Stiennon et al., "Learning to summarize from human feedback" (2020); Gao et al., "Scaling Laws for Reward
    Model Overoptimization" (2023).
    """

    name = "reward_model"
    stops = False
    every: Any = "end"
    batched = True

    def __init__(self, model: str, change: bool = False, dtype: str = "float32", device: str | None = None) -> None:
        """Loads the model; see ``Fluency`` for ``dtype`` and ``device``. UserError where it cannot be used."""
        if not isinstance(change, bool):
            raise UserError(f"{self.name}: change={change!r} must be true or false")
        self.change = change
        self.every = "sentence" if change else "end"
        self.frozen = load(model, dtype, device, "SequenceClassification")
        outputs = self.frozen.model.config.num_labels
        if outputs != 1:
            raise UserError(
                f"{self.name}: {model} has {outputs} outputs and not one; it is a classifier, no reward model"
            )
        self.frozen.tokenizer.truncation_side = "left"
        self.tokens = Tokens(self.frozen.tokenizer, model)
        self._head = linear_head(self.frozen, model) if self.frozen.causal else None

    def start(self, prompt: Prompt) -> Rated:
        """The state of a text that has just begun."""
        if not self.frozen.causal:
            return Rated(prompt, Memory())
        return Rated(prompt, self.frozen.memory(self.tokens.of_prompt(prompt)[:-1]))

    def extend(self, states: Sequence[Rated], views: Sequence[View]) -> list[float]:
        """The score of each text so far; with ``change``, how much it rose since the last piece."""
        if self.change and (new := [state for state in states if state.before is None]):
            for state, score in zip(new, self._scores(new, [""] * len(new)), strict=True):
                state.before = score
        found = []
        for state, score in zip(states, self._scores(states, [view.text for view in views]), strict=True):
            found.append(score - (state.before or 0.0) if self.change else score)
            state.before = score
        return found

    def score(self, text: str, prompt: str | list[Message] = "") -> float:
        """The score of one finished text."""
        return self._scores([self.start(as_prompt(prompt))], [text])[0]

    def _scores(self, states: Sequence[Rated], texts: Sequence[str]) -> list[float]:
        if self._head is None:
            return self._both_ways([state.prompt for state in states], texts)
        jobs, head = [], self._head
        for state, text in zip(states, texts, strict=True):
            ids = self._ids(state.prompt, text)[-self.frozen.context :]
            jobs.append(Job(state.memory, ids, len(ids) - 1, len(ids)))
        return [float(made[0]) for made in self.frozen.read(jobs, lambda states, _: head(states)[:, 0], logits=False)]

    def _ids(self, prompt: Prompt, text: str) -> list[int]:
        tokenizer, chat = self.frozen.tokenizer, self.tokens.chat(prompt, text)
        if chat is not None:
            ids: list[int] = tokenizer(chat, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = tokenizer(clean(plain_text(prompt) + text), verbose=False)["input_ids"]
        return ids or self.tokens.of_prompt(as_prompt(""))

    def _both_ways(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Models without a direction read all anew; pairs, and texts that stand alone, in batches of like length."""
        chats = [self.tokens.chat(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        firsts = ["" if chat else clean(plain_text(one)) for one, chat in zip(prompts, chats, strict=True)]
        seconds = [chat or clean(text) for chat, text in zip(chats, texts, strict=True)]
        found = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(firsts[i]) + len(seconds[i]))
        for paired in (True, False):
            rows = [i for i in order if bool(firsts[i]) is paired]
            for first in range(0, len(rows), _TOGETHER):
                batch = rows[first : first + _TOGETHER]
                texts_of = [[firsts[i] for i in batch], [seconds[i] for i in batch]]
                for i, score in zip(batch, self._classified(texts_of if paired else texts_of[1:]), strict=True):
                    found[i] = score
        return found

    def _classified(self, texts: Sequence[list[str]]) -> list[float]:
        """Scores of texts, or of pairs given as two lists."""
        import torch

        tokenizer = self.frozen.tokenizer
        rows = dict(tokenizer(*texts, truncation=True, max_length=self.frozen.context))
        for i, ids in enumerate(rows["input_ids"]):
            if not ids:  # an empty text, and a tokenizer that puts no special tokens around it
                first = self.tokens.of_prompt(as_prompt(""))
                for key in rows:
                    rows[key][i] = {"input_ids": first, "attention_mask": [1]}.get(key, [0])
        made = tokenizer.pad(rows, return_tensors="pt").to(self.frozen.device)
        with torch.no_grad(), torch.autocast(self.frozen.device.type, enabled=False):
            scores: list[float] = self.frozen.model(**made).logits[:, 0].tolist()
        self.frozen.tokens_read += int(made["attention_mask"].sum())
        return scores


class StepRewardModel:
    """What a process reward model says of each step of a solution, where a step is a piece (``every``).

    Three kinds of models that read from left to right are supported. A token classifier
    (``AutoModelForTokenClassification``) or a sequence classifier whose linear head is read at the end of the step:
    with one output that is the value, any number; with more it is the probability of ``label`` (a name or a number; the
    last one where none is given). And with ``good`` and ``bad``, a causal language model that was trained to say one of
    two tokens after each step: the value is the probability of the good one out of the two. Models that come with code
    of their own are not supported, and neither are ones that read in both directions.

    The model reads the prompt and each step, every step tokenised by itself. ``separator`` is put after each step, as
    in the model's training, and the value is read at its end, ``between`` after that; white space around a step is then
    left out. Without a separator the value is read at the step's last token. A piece without visible characters is no
    step. What is beyond the model's context is left out at the beginning.

    Cost: one pass over each token. What games it: many small steps that are true and lead nowhere, where values are
    above 0; steps that repeat the question. Keep the final answer's check beside it, as a held-out measure at least.

    Source: Lightman et al., "Let's Verify Step by Step" (2023); Wang et al., "Math-Shepherd" (2024), whose models say
    " +" or " -" after " ки".
    """

    name = "step_reward_model"
    stops = False
    every: Any = "sentence"
    batched = True

    def __init__(
        self,
        model: str,
        good: str | None = None,
        bad: str | None = None,
        separator: str = "",
        between: str = "",
        label: str | int | None = None,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        """Loads the model; see ``Fluency`` for ``dtype`` and ``device``. UserError where it cannot be used so."""
        if (good is None) != (bad is None) or (good is not None and label is not None):
            raise UserError(f"{self.name}: give both good and bad, for a model that says one of two tokens, or a label")
        if between and not separator:
            raise UserError(f"{self.name}: between={between!r} stands after a separator; give one")
        self.logits = good is not None
        if good is not None and bad is not None:
            self.frozen = load(model, dtype, device)
            self._measure = self._one_of(good, bad)
        else:
            self.frozen, self._measure = _classifier(model, label, dtype, device, self.name)
        if not self.frozen.causal:
            raise UserError(f"{self.name}: {model} reads in both directions; use one that reads from left to right")
        self.tokens = Tokens(self.frozen.tokenizer, model)
        self.separator, self._after = separator, self.tokens.ids_of(separator)
        self._between = self.tokens.ids_of(between)

    def start(self, prompt: Prompt) -> Steps:
        """The state of a text that has just begun."""
        ids = self.tokens.of_prompt(prompt)
        return Steps(ids, self.frozen.memory(ids[:-1]))

    def extend(self, states: Sequence[Steps], views: Sequence[View]) -> list[float | None]:
        """The value of each text's newest step."""
        jobs: list[Job] = []
        rated: list[int] = []
        for number, (state, view) in enumerate(zip(states, views, strict=True)):
            state.waiting += view.piece
            if not state.waiting.strip():
                continue
            step, state.waiting = state.waiting.strip() if self.separator else state.waiting, ""
            added = self.tokens.ids_of(step) + self._after
            if added:
                state.ids += (self._between if state.count else []) + added
                state.count += 1
                rated.append(number)
                ids = state.ids[-self.frozen.context :]
                jobs.append(Job(state.memory, ids, len(ids) - 1, len(ids)))
        values: list[float | None] = [None] * len(views)
        for number, made in zip(rated, self.frozen.read(jobs, self._measure, self.logits), strict=True):
            values[number] = float(made[0])
        return values

    def score(self, text: str, prompt: str | list[Message] = "") -> float | None:
        """The value of a text that is one step."""
        made = as_prompt(prompt)
        return self.extend([self.start(made)], [View(text, text, made, made.info, done=True)])[0]

    def _one_of(self, good: str, bad: str) -> Measure:
        """The probability of the good token out of the two."""
        tokens = Tokens(self.frozen.tokenizer, self.frozen.name)
        pair = []
        for word in (good, bad):
            ids = tokens.ids_of(word)
            if len(ids) != 1:
                raise UserError(f"{self.name}: {word!r} is {len(ids)} tokens of {self.frozen.name}; name one token")
            pair += ids
        return lambda logits, _: exact(logits[:, pair[0]] - logits[:, pair[1]]).sigmoid()


@dataclass
class Steps:
    """The state of one text: the tokens of its prompt and steps, what was read, and white space that waits."""

    ids: list[int]
    memory: Memory
    count: int = 0
    waiting: str = ""


class TokenRewardModel(TokenReward):
    """What a token-level reward model says of each token: the output of a linear head. Any number, or in [0, 1].

    The models of ``StepRewardModel`` that have a head, read at every token: with one output the value itself, with
    more the probability of ``label``. Each value is paid on the characters of its token; ``mean`` pays each piece one
    number, the mean over its tokens. When the policy has another tokenizer, ``token_values`` says what happens.

    Cost: one pass over each token. What games it: length where values are above 0, and the end where they are below
    (``mean`` with ``every: end`` has no such pull).

    Source: Wu et al., "Fine-Grained Human Feedback Gives Better Rewards for Language Model Training" (2023).
    """

    name = "token_reward_model"

    def __init__(
        self,
        model: str,
        label: str | int | None = None,
        mean: bool = False,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        """Loads the model; see ``Fluency`` for ``dtype`` and ``device``. UserError where it cannot be used so."""
        frozen, measure = _classifier(model, label, dtype, device, self.name)
        super().__init__([(TokenScorer(frozen, measure, logits=False, before=False), 1.0)], mean)


def _classifier(
    model: str, label: str | int | None, dtype: str, device: str | None, who: str
) -> tuple[Frozen, Measure]:
    """A model with a linear head, and what makes a value of its hidden states."""
    folder = models.locate(model)
    made = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["unknown"]
    kinds = [kind for kind in ("TokenClassification", "SequenceClassification") if made[0].endswith(f"For{kind}")]
    if not kinds:
        raise UserError(
            f"{who}: {model} was made as {made[0]}; give a token classifier, a sequence classifier, or to "
            "StepRewardModel a causal language model with good and bad"
        )
    frozen = load(model, dtype, device, kinds[0])
    outputs = frozen.model.config.num_labels
    names = {str(name): int(number) for name, number in frozen.model.config.label2id.items()}
    chosen = outputs - 1 if label is None else names.get(label, -1) if isinstance(label, str) else label
    if not 0 <= chosen < outputs or (outputs == 1 and label is not None):
        there = ", ".join(names) if outputs > 1 else "one output without a label"
        raise UserError(f"{who}: label={label!r} is none of {model}; it has {there}")
    if not frozen.causal:
        raise UserError(f"{who}: {model} reads in both directions; use one that reads from left to right")
    head = linear_head(frozen, model)
    if outputs == 1:
        return frozen, lambda states, _: head(states)[:, 0]
    return frozen, lambda states, _: exact(head(states)).softmax(-1)[:, chosen]


def linear_head(frozen: Frozen, model: str) -> Callable[[Tensor], Tensor]:
    """What makes a classifier's outputs of its last hidden states."""
    from torch.nn import Linear

    found = [getattr(frozen.model, name, None) for name in ("score", "classifier")]
    for head in found:
        if isinstance(head, Linear):
            return head
    raise UserError(f"{model} has no linear head that is called score or classifier; use another reward model")
