"""How much of a text is about a wanted topic, by a topic model (NMF) of a corpus of one's own.

rewards:
  - use: instant_reward.rewards.topic:Topic
    args: {corpus: articles.txt, topic: [football, goal]}
    change: true
    every: word
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any, overload

import numpy as np

from instant_reward import cache
from instant_reward.notice import status
from instant_reward.rewards.growing import stream_of, tokens_of
from instant_reward.text import _SPACELESS  # one list of the scripts without spaces for the whole library
from instant_reward.types import UserError

_FORMAT = 1  # of the cached files and of how they are made: raise it when either changes
_SHOWN = 10  # words that stand for a topic
_SHORTENED = re.compile(r"n?['\u2019](?:[tsmd]|ve|ll|re)\b", re.IGNORECASE)  # the rest of "didn't" is a stop word
_NOTHING = 1e-12  # a weight below this is rounding


def terms(text: str) -> list[str]:
    """The words of ``text`` without case; in scripts without spaces (Chinese) every character and pair of them."""
    words = tokens_of(stream_of("auto"), _SHORTENED.sub("", text))
    return words + [one + other for one, other in pairwise(words) if _spaceless(one) and _spaceless(other)]


class Topic:
    """The share of a wanted topic in all that a text is about, by a topic model of a corpus. In [0, 1].

    The model is a non-negative matrix factorisation (NMF) of the TF-IDF of the corpus' words; a text is the mixture of
    topics that comes nearest to its words, and the wanted one's share of that mixture is the score. A text with no word
    that the model knows, the empty one too, gets the share that it would have by chance: 1 over the number of topics.

    The corpus is a file (``.txt`` with a document a line; ``.csv``, ``.jsonl`` with a ``column``) or a list of texts, a
    few hundred at least, in any language; of Chinese it takes characters and pairs of them for words. The model is made
    at first use and kept in the cache; the same corpus and settings give the same one.

    Cost: some 50 microseconds and half a microsecond per character; making the model takes seconds for thousands of
    documents.

    What games it: one of the topic's words alone, or all of them without a sentence: it reads no grammar, and because
    it is a share, saying little else is as good as saying more. Keep a fluency or a reference KL beside it.

    Source: Lee and Seung, "Learning the parts of objects by non-negative matrix factorization" (1999), by scikit-learn;
    the mixture by Lawson and Hanson's non-negative least squares.

    Attributes:
        topic: the wanted topic's number.
        words: of each topic its ten heaviest words.
    """

    name = "topic"
    stops = False

    def __init__(
        self,
        corpus: str | Path | Sequence[str],
        topic: int | str | Sequence[str],
        *,
        topics: int = 20,
        column: str = "text",
        min_count: int = 3,
        max_share: float = 0.3,
        max_terms: int = 20_000,
    ) -> None:
        """Loads the topic model, made first where the cache has none for this corpus and these settings.

        Args:
            corpus: a file, or the documents themselves.
            topic: the number of the wanted topic, or key words: the topic in which they weigh most is then wanted.
            topics: how many topics the corpus is parted into.
            column: of a CSV or JSONL file.
            min_count: a word found in fewer documents is left out; max_share: and one found in a greater share of them.
            max_terms: how many words are kept, the most frequent ones.

        Raises:
            UserError: scikit-learn is missing, the corpus cannot be used, or no topic has such a number or key words.
        """
        _check(topics, min_count, max_share, max_terms)
        documents = _documents(corpus, column)
        settings = [_FORMAT, topics, min_count, max_share, max_terms]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for document in documents:
            digest.update(document.encode("utf-8", "surrogatepass") + b"\0")

        def build(target: Path) -> None:
            with status(f"finding {topics} topics in {len(documents)} documents (once)"):
                made = _factorised(documents, topics, min_count, max_share, max_terms)
            np.save(target / "topics.npy", made.pop("topics"))
            (target / "terms.json").write_text(json.dumps(made), encoding="utf-8")

        kept = cache.folder(f"topics/{digest.hexdigest()[:16]}", build)
        made = json.loads((kept / "terms.json").read_text(encoding="utf-8"))
        self._topics = np.load(
            kept / "topics.npy"
        )  # [topics, terms], each row adds up to 1, or to 0 if nothing is left
        self._idf: list[float] = made["idf"]
        self._places: dict[str, int] = {term: place for place, term in enumerate(made["terms"])}
        self.words = [
            [made["terms"][place] for place in np.argsort(-row, kind="stable")[:_SHOWN] if row[place] > 0]
            for row in self._topics
        ]
        # Least squares over the topics alone: |x - w H|^2 is |b - w A|^2 plus a constant, A A' = H H' and b A' = x H'.
        gram = self._topics @ self._topics.T
        gram += np.eye(topics) * max(gram.trace(), _NOTHING) * 1e-10  # so that two equal topics do no harm
        self._root = np.linalg.cholesky(gram).T
        self.topic = self._wanted(topic)

    @overload
    def __call__(self, text: str) -> float: ...
    @overload
    def __call__(self, text: list[str]) -> list[float]: ...
    def __call__(self, text: str | list[str]) -> float | list[float]:
        """The wanted topic's share of the text; a list of texts gives a list."""
        if isinstance(text, str):
            return float(self.mixture(text)[self.topic])
        return [float(self.mixture(one)[self.topic]) for one in text]

    def mixture(self, text: str) -> Any:
        """The share of every topic, ``[topics]``; they add up to 1."""
        from scipy.optimize import nnls  # type: ignore[import-untyped]

        counts = Counter(terms(text))
        found = [(self._places[term], count) for term, count in counts.items() if term in self._places]
        even = np.full(len(self._topics), 1.0 / len(self._topics))
        if not found:
            return even
        places = [place for place, _ in found]
        values = np.array([(1.0 + log(count)) * self._idf[place] for place, count in found])
        near = self._topics[:, places] @ values
        weights, _ = nnls(self._root, np.linalg.solve(self._root.T, near), maxiter=50 * len(near))
        total = weights.sum()
        return weights / total if total > _NOTHING else even

    def _wanted(self, topic: int | str | Sequence[str]) -> int:
        count = len(self.words)
        if type(topic) is int:
            if not 0 <= topic < count or not self.words[topic]:
                raise UserError(f"Topic: there is no topic {topic}; give a number from 0 to {count - 1}, or key words")
            return topic
        given = [topic] if isinstance(topic, str) else topic
        if not isinstance(given, list | tuple) or not given or not all(isinstance(word, str) for word in given):
            raise UserError(f"Topic: topic={topic!r} must be a topic's number or a list of key words")
        known = [self._places[term] for word in given for term in _key(word) if term in self._places]
        weights = self._topics[:, known].sum(axis=1) if known else np.zeros(count)
        if not weights.max() > 0:
            shown = "; ".join(f"{number}: {' '.join(words[:4])}" for number, words in enumerate(self.words[:8]))
            raise UserError(
                f"Topic: no topic has the key words {', '.join(given)}; use some of the corpus (its topics are {shown})"
            )
        return int(weights.argmax())


def _key(word: str) -> list[str]:
    """A key word's terms: of several Chinese characters the pairs alone, which say more than each."""
    found = terms(word)
    return [term for term in found if len(term) > 1] or found


def _spaceless(word: str) -> bool:
    return any(low <= ord(word[0]) <= high for low, high in _SPACELESS)


def _check(topics: Any, min_count: Any, max_share: Any, max_terms: Any) -> None:
    for label, number, least in (("topics", topics, 2), ("min_count", min_count, 1), ("max_terms", max_terms, 2)):
        if type(number) is not int or number < least:
            raise UserError(f"Topic: {label}={number!r} must be a whole number from {least}")
    if isinstance(max_share, bool) or not isinstance(max_share, int | float) or not 0 < max_share <= 1:
        raise UserError(f"Topic: max_share={max_share!r} must be a share above 0 and up to 1")


def _documents(corpus: str | Path | Sequence[str], column: str) -> list[str]:
    if isinstance(corpus, str | Path):
        found, where = list(_read(Path(corpus).expanduser(), column)), str(corpus)
    else:
        found, where = list(corpus), "the list of documents"
    for number, document in enumerate(found):
        if not isinstance(document, str):
            kind = type(document).__name__
            raise UserError(f"Topic: document {number} of {where} is a {kind}; every document must be text")
    documents = list(dict.fromkeys(document for document in found if document.strip()))
    if not documents:
        raise UserError(f"Topic: {where} has no documents; give some hundreds")
    return documents


def _read(path: Path, column: str) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"Topic: there is no corpus file {path}; check the path")
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            if path.suffix.lower() == ".csv":
                for row in csv.DictReader(handle, strict=True):
                    yield _cell(row, column, path)
            elif path.suffix.lower() == ".jsonl":
                for line in handle:
                    if line.strip():
                        yield _cell(json.loads(line), column, path)
            else:
                yield from handle
    except UnicodeDecodeError as error:
        raise UserError(f"Topic: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"Topic: {path} cannot be read as {path.suffix[1:].upper()} ({error}); mend it") from error
    except OSError as error:
        raise UserError(f"Topic: {path} cannot be read ({error.strerror or error}); check it") from error


def _cell(row: Any, column: str, path: Path) -> Any:
    if not isinstance(row, dict) or row.get(column) is None:
        there = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
        raise UserError(
            f"Topic: {path} has a row without the column {column!r} (it has: {there}); name it as column=..."
        )
    return row[column]


def _factorised(
    documents: Sequence[str], topics: int, min_count: int, max_share: float, max_terms: int
) -> dict[str, Any]:
    """The terms, the idf of each, and the topics as an array ``[topics, terms]`` whose rows add up to 1."""
    try:
        from sklearn.decomposition import NMF
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
    except ImportError as error:
        raise UserError("Topic needs the package scikit-learn; run: pip install 'instant-reward[sentiment]'") from error

    def contents(text: str) -> list[str]:
        return [term for term in terms(text) if term not in ENGLISH_STOP_WORDS]

    vectorizer = TfidfVectorizer(
        analyzer=contents, sublinear_tf=True, min_df=min_count, max_df=max_share, max_features=max_terms
    )
    try:
        features = vectorizer.fit_transform(documents)
    except ValueError as error:  # no term is left between the two bounds
        raise UserError(
            f"Topic: the {len(documents)} documents have no words in common ({error}); give more of them, or lower "
            "min_count or raise max_share"
        ) from error
    most = min(features.shape)
    if topics > most:
        raise UserError(
            f"Topic: {features.shape[0]} documents with {features.shape[1]} frequent words hold no {topics} topics; "
            f"give more documents, or topics of at most {most}"
        )
    model = NMF(n_components=topics, init="nndsvda", random_state=0, max_iter=400)
    with warnings.catch_warnings():  # a factorisation that would still improve a little is as good a yardstick
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features)
    sums = model.components_.sum(axis=1, keepdims=True)
    shares = np.divide(model.components_, sums, out=np.zeros_like(model.components_), where=sums > 0)
    return {
        "terms": vectorizer.get_feature_names_out().tolist(),
        "idf": vectorizer.idf_.tolist(),
        "topics": shares,
    }
