"""Whether the text follows from its prompt, from a source, or from what it said before: natural-language inference.

rewards:
  - use: instant_reward.rewards.entailment:Entailment
    args: {model: owner/name-of-an-nli-model, premise: source}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instant_reward.rewards.embedding import Of, before, check_of, others, readable
from instant_reward.rewards.reference import finite
from instant_reward.rewards.sentiment_models import Heads
from instant_reward.types import UserError, View

Pair = tuple[str, str]  # premise, hypothesis


class Entailment:
    """How far the newest sentence follows from a premise: the probability of entailment less that of contradiction.

    In [-1, 1] (in [0, 1] with ``penalty: 0``, which leaves contradiction out). ``premise`` is "prompt" (of messages,
    the user's last one), "before" (the text before the newest piece: does it contradict itself? the first piece gets
    nothing), or the name of a column of the data; of a list in it the most favourable one counts, and so does the most
    favourable part of a premise longer than the model reads. ``of`` is "piece" (each sentence, the default) or "text"
    (all of it, at its end). A text without a visible character scores 0. Any model of transformers that was trained for
    inference will do, a multilingual one for Chinese; its labels are found by their names, or named as ``entails`` and
    ``contradicts``.

    Cost: a forward pass over premise and sentence together for each sentence, in batches: the most of all the small
    models, and once more for each part of a long premise.

    What games it: sentences that follow from anything ("something is the case"), and a copy of the premise; models of
    inference look for shared words, and take much of what is merely unrelated for contradiction. Pay for substance
    beside it.

    Source: labels as in Bowman et al., "A large annotated corpus for learning natural language inference" (2015); the
    best part of a long premise: Laban et al., "SummaC: Re-Visiting NLI-based Models for Inconsistency Detection in
    Summarization" (2022).
    """

    name = "entailment"
    stops = False
    batched = True

    def __init__(
        self,
        model: str | Path,
        premise: str = "prompt",
        of: Of = "piece",
        *,
        penalty: float = 1.0,
        entails: str | int | None = None,
        contradicts: str | int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch: int = 32,
        max_tokens: int | None = None,
    ) -> None:
        """Loads the model.

        Args:
            model: a local folder, or a hub id.
            penalty: what the probability of contradiction counts against that of entailment.
            entails, contradicts: the labels' names or numbers, where they are not called so.
            device, dtype, batch, max_tokens: see ``Classifier``; premise and sentence share the tokens.

        Raises:
            UserError: the model cannot be found or loaded, or has no such labels.
        """
        check_of("Entailment", premise, "premise", of)
        if not finite(penalty, 0.0):
            raise UserError(f"Entailment: penalty={penalty!r} must be a number from 0")
        self.premise, self.of, self.penalty = premise, of, float(penalty)
        self.every = "sentence" if of == "piece" else "end"
        self.heads = Heads("Entailment", model, device=device, dtype=dtype, batch=batch, max_tokens=max_tokens)
        if not self.heads.encoder.tokenizer.is_fast:
            raise UserError("Entailment: the model has no fast tokenizer, which long premises need; use another model")
        self._entails = self._place("entail", entails, "entails")
        self._contradicts = self._place("contradict", contradicts, "contradicts") if penalty else None

    def _place(self, stem: str, label: str | int | None, argument: str) -> int:
        labels = self.heads.labels
        if label is not None:
            found = [self.heads.place(label)]
        else:
            found = [number for number, name in enumerate(labels) if name.casefold().startswith(stem)]
        if len(found) == 1 and found[0] is not None:
            return found[0]
        hint = ", or set penalty: 0" if argument == "contradicts" else ""
        wanted = repr(label) if label is not None else f"{stem}..."
        there = ", ".join(labels)
        raise UserError(
            f"Entailment: the model has no label {wanted} (it has: {there}); name it as {argument}=...{hint}"
        )

    def __call__(self, views: list[View]) -> list[float | None]:
        """The score of each view."""
        pairs = [self._pairs(view) for view in views]
        different = list(dict.fromkeys(pair for one in pairs for pair in one or ()))
        known = dict(zip(different, self._scores(different), strict=True))
        return [None if one is None else max((known[pair] for pair in one), default=0.0) for one in pairs]

    def _pairs(self, view: View) -> list[Pair] | None:
        """What is to be read for a view: nothing for an invisible text; None where it has nothing to say."""
        hypothesis = view.piece if self.of == "piece" else view.text
        if not hypothesis.strip():
            return []
        if self.premise == "before":
            premise = before(view)
            return [(premise, hypothesis)] if premise else None
        return [(premise, hypothesis) for premise in others(view.prompt, self.premise, "Entailment", "premise")]

    def _scores(self, pairs: Sequence[Pair]) -> list[float]:
        """Entailment less contradiction of each pair, in the premise's most favourable part."""
        if not pairs:
            return []
        made = self._parts(pairs)
        owners: list[int] = made["overflow_to_sample_mapping"]
        found = self.heads(self.heads.encoder.split(made, len(owners))).tolist()
        best: dict[int, float] = {}
        for owner, row in zip(owners, found, strict=True):
            score = row[self._entails]
            if self._contradicts is not None:
                score -= self.penalty * row[self._contradicts]
            best[owner] = max(score, best.get(owner, score))
        return [best[number] for number in range(len(pairs))]

    def _parts(self, pairs: Sequence[Pair]) -> Any:
        """The tokens of each pair; a premise that is too long becomes several parts, which overlap a little."""
        encoder = self.heads.encoder
        premises = [readable(premise) for premise, _ in pairs]
        hypotheses = [self._end(readable(hypothesis), encoder.limit // 2) for _, hypothesis in pairs]
        return encoder.tokenizer(
            premises,
            hypotheses,
            truncation="only_first",
            max_length=encoder.limit,
            stride=encoder.limit // 16,
            return_overflowing_tokens=True,
        )

    def _end(self, text: str, count: int) -> str:
        """The end of the text that has about ``count`` tokens: what is new stands there."""
        made = self.heads.encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets: list[tuple[int, int]] = made["offset_mapping"]
        return text if len(offsets) <= count else text[offsets[-count][0] :]
