"""How warm a text is, or how much of any other label it has: TextBlob, and any sequence classifier of Hugging Face.

rewards:
  - use: instant_reward.rewards.sentiment_models:Classifier
    args: {model: owner/name-of-a-classifier, label: positive}
  - use: instant_reward.rewards.sentiment_models:PieceClassifier
    args: {model: folder/of/a/classifier, label: {toxic: -1}}
    every: sentence
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from instant_reward.rewards.embedding import Encoder
from instant_reward.types import UserError, View

if TYPE_CHECKING:
    from torch import Tensor

Label = str | int | Sequence[str | int] | Mapping[str | int, float] | None
Output = Literal["probability", "logit"]


class TextBlob:
    """TextBlob's polarity of an English text in [-1, 1], or with ``part="subjectivity"`` its subjectivity in [0, 1].

    The mean over the words of a lexicon of some 2,900 rated by people, with rules for negation and emphasis; nothing
    is trained. A text without any such word, the empty one and one in another language score 0.

    Cost: some 2 microseconds a word. What games it: any rated word; because it is a mean, one "perfect" and silence
    beat a warm but longer text. Source: the library TextBlob, whose lexicon and rules are those of Pattern: De Smedt
    and Daelemans, "Pattern for Python" (2012).
    """

    name = "textblob"
    stops = False

    def __init__(self, part: str = "polarity") -> None:
        """Raises UserError where ``part`` is neither, or the package textblob is missing."""
        if part not in ("polarity", "subjectivity"):
            raise UserError(f"TextBlob: part={part!r} is unknown; use 'polarity' or 'subjectivity'")
        try:
            from textblob.en.sentiments import PatternAnalyzer  # type: ignore[import-untyped]
        except ImportError as error:
            raise UserError("TextBlob needs the package textblob; run: pip install 'instant-reward[models]'") from error
        self.part = part
        self._analyser: Any = PatternAnalyzer()
        self._analyser.analyze("good")  # reads the lexicon now, not while texts are written

    @overload
    def __call__(self, text: str) -> float: ...
    @overload
    def __call__(self, text: list[str]) -> list[float]: ...
    def __call__(self, text: str | list[str]) -> float | list[float]:
        """The score of the text; a list of texts gives a list."""
        return self._score(text) if isinstance(text, str) else [self._score(one) for one in text]

    def _score(self, text: str) -> float:
        return float(getattr(self._analyser.analyze(text), self.part))


class Labelled:
    """What the rewards by a sequence classifier share: the model, and what each of its labels is worth.

    Args:
        model: a local folder, or a hub id.
        label: what is wanted: a label's name (upper or lower case) or number; a list of them, whose probabilities are
            added; or a mapping of labels to what each is worth, ``{positive: 1, negative: -1}``. May be left out for a
            model with one output.
        output: "probability" (softmax; sigmoid where labels do not exclude each other or there is only one; a
            regression's number as it is) or "logit" (the model's own numbers).
        device: "cpu", "cuda", ...; without it a GPU where there is one.
        dtype: "float32", "bfloat16" or "float16".
        batch: how many texts are read at once; with 1 a value does not depend on its neighbours, to the last bit.
        max_tokens: of a longer text only the end is read; without it what the model can read.

    Raises UserError where the model cannot be found or loaded, has no classification head, or has no such label.
    """

    name = "classifier"
    stops = False
    batched = True

    def __init__(
        self,
        model: str | Path,
        label: Label = None,
        *,
        output: Output = "probability",
        device: str | None = None,
        dtype: str = "float32",
        batch: int = 32,
        max_tokens: int | None = None,
    ) -> None:
        who = type(self).__name__
        if output not in ("probability", "logit"):
            raise UserError(f"{who}: output={output!r} is unknown; use 'probability' or 'logit'")
        self.heads = Heads(who, model, device=device, dtype=dtype, batch=batch, max_tokens=max_tokens)
        self.worth = _worth(who, self.heads, label)
        self.output = output

    def scores(self, texts: Sequence[str]) -> list[float]:
        """What the labels of each text are worth; equal texts are read once."""
        different = list(dict.fromkeys(texts))
        found = self.heads(self.heads.encoder.rows(different), probabilities=self.output == "probability")
        values = [sum(worth * row[place] for place, worth in self.worth.items()) for row in found.tolist()]
        known = dict(zip(different, values, strict=True))
        return [known[text] for text in texts]


class Classifier(Labelled):
    """The probability that a sequence classifier gives a label, read from the whole text so far. In [0, 1].

    Any classifier of transformers will do, of sentiment, toxicity, topic, formality, in the language that it was
    trained on: Chinese by a Chinese one. ``label`` says what is wanted: a name, a number, several of them (added), or
    what each is worth (``{positive: 1, negative: -1}`` lies in [-1, 1]); ``output: logit`` gives the model's own
    numbers, without bounds. Works as a change per word or sentence too (``change: true``).

    Cost: a forward pass over the text at each piece, in batches: some 0.5 s on one CPU core for 64 short texts with an
    encoder of 20 million weights, and in proportion. Of a text longer than the model reads, the end counts.

    What games it: whatever the classifier was not trained on: words that carry a label, piled up, with no grammar
    around them. It knows whole texts: what it says of a beginning is a guess. Keep a reference KL beside it and watch
    a score that it does not know.

    Source: the model's own card; Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
    Understanding" (2019) for the usual architecture.
    """

    @overload
    def __call__(self, text: str) -> float: ...
    @overload
    def __call__(self, text: list[str]) -> list[float]: ...
    def __call__(self, text: str | list[str]) -> float | list[float]:
        """The score of the text; a list of texts gives a list."""
        return self.scores([text])[0] if isinstance(text, str) else self.scores(text)


class PieceClassifier(Labelled):
    """The probability that a sequence classifier gives a label, read from the newest sentence alone. In [0, 1].

    ``Classifier`` for each piece by itself (a sentence, unless ``every`` says otherwise): a classifier of sentences
    then rates what it was trained on, and a bad sentence is not hidden by good ones. A piece without a visible
    character is not rated. ``label`` and the other arguments as for ``Classifier``.

    Cost: a forward pass over each piece once, in batches: less than ``Classifier``, which reads the text anew.

    What games it: as ``Classifier``; and many short pieces earn more than few long ones where the label is wanted, and
    less where it is not: length then pays, so hold it (a target, a penalty) or centre the worth, ``{positive: 1,
    negative: -1}``.

    Source: rewards per sentence by a classifier: Wu et al., "Fine-Grained Human Feedback Gives Better Rewards for
    Language Model Training" (2023).
    """

    name = "piece_classifier"
    every = "sentence"

    def __call__(self, views: list[View]) -> list[float | None]:
        """The score of each view's newest piece."""
        rated = [view.piece for view in views if view.piece.strip()]
        scores = iter(self.scores(rated) if rated else [])
        return [next(scores) if view.piece.strip() else None for view in views]


class Heads:
    """A sequence classifier and what its outputs are called.

    Attributes:
        labels: the name of each output.
        exclusive: whether exactly one label is true of a text (softmax).
    """

    def __init__(self, who: str, model: str | Path, **options: Any) -> None:
        self.encoder = Encoder(who, "AutoModelForSequenceClassification", model, **options)
        config = self.encoder.model.config
        names = {int(number): str(name) for number, name in config.id2label.items()}
        self.labels = [names.get(number, f"LABEL_{number}") for number in range(config.num_labels)]
        self.problem = config.problem_type
        self.exclusive = len(self.labels) > 1 and self.problem != "multi_label_classification"

    def __call__(self, rows: Sequence[dict[str, list[int]]], probabilities: bool = True) -> Tensor:
        """``[N, labels]``: probabilities, or what the model says itself."""
        logits = self.encoder.read(rows, lambda output, mask: output.logits)
        if not probabilities or self.problem == "regression":
            return logits
        return logits.softmax(dim=-1) if self.exclusive else logits.sigmoid()

    def place(self, label: Any) -> int | None:
        """The number of the label with this name or number; None where there is none."""
        if isinstance(label, str):
            found = [number for number, name in enumerate(self.labels) if name.casefold() == label.casefold()]
            return found[0] if found else None
        return label if type(label) is int and 0 <= label < len(self.labels) else None


def _worth(who: str, heads: Heads, label: Label) -> dict[int, float]:
    """What each output is worth."""
    there = ", ".join(heads.labels)
    if label is None:
        if len(heads.labels) > 1:
            raise UserError(f"{who}: the model has the labels {there}; say which one is wanted as label=...")
        return {0: 1.0}
    if isinstance(label, Mapping):
        wanted = dict(label)
    else:
        several = label if isinstance(label, Sequence) and not isinstance(label, str) else [label]
        wanted = dict.fromkeys(several, 1.0)
    if not wanted:
        raise UserError(f"{who}: label={label!r} names none of the labels {there}; name one")
    worth: dict[int, float] = {}
    for one, value in wanted.items():
        place = heads.place(one)
        if place is None:
            raise UserError(f"{who}: the model has no label {one!r} (it has: {there}); use one of these")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{who}: label {one!r} is worth {value!r}; give a finite number")
        worth[place] = worth.get(place, 0.0) + float(value)
    return worth
