"""Figures over sampled texts, torch-free: diversity, length, perplexity, means with intervals, smoothed series."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instant_reward.types import Rollout, UserError

Floats = NDArray[np.float64]
Score = Callable[[list[str]], list[float]]
ReferenceLogprobs = Callable[[list[Rollout]], list[list[float]]]

# Scripts written without spaces between words, where every character counts as a word: kana, Han, Thai to Khmer.
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and the ends of its bootstrap interval; ``count`` values stand behind it."""

    mean: float
    low: float
    high: float
    count: int


def words(text: str) -> Iterator[str]:
    """The lower-cased words of a text; a character of an unspaced script, a sign and an emoji are words each.

    Signs count because a policy that learned to write nothing but exclamation marks must not look diverse.
    """
    word, open_ended = "", False
    for character in text.lower():
        attached = unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")
        joins = _in_word(character) and not _unspaced(character)
        if word and (attached or (open_ended and (joins or character in "'’"))):
            word += "'" if character == "’" else character
            continue
        if word:
            yield word.rstrip("'") or word
        word, open_ended = "" if character.isspace() else character, joins
    if word:
        yield word.rstrip("'") or word


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _unspaced(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _UNSPACED)


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words over all n-grams, counted over the whole set; NaN where there is none.

    The figure falls as a set grows, whatever is in it: compare only sets with as many texts, of about the same length.
    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models".
    """
    if n < 1:
        raise UserError(f"distinct_n needs n of at least 1, got {n}; give the number of words in a row.")
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        row = list(words(text))
        grams = [tuple(row[index : index + n]) for index in range(len(row) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else math.nan


def length_stats(lengths: Sequence[int]) -> dict[str, float]:
    """``mean``, ``median``, ``min`` and ``max`` of lengths, NaN where there is none."""
    if not lengths:
        return dict.fromkeys(("mean", "median", "min", "max"), math.nan)
    values = np.asarray(lengths, dtype=np.float64)
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def mean_interval(
    values: Sequence[float],
    groups: Sequence[int] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean with its percentile bootstrap interval.

    ``groups`` (as long as ``values``) says which values belong together: siblings of one prompt are more alike than
    texts of different prompts, so whole groups are drawn, and the interval is about new prompts.
    """
    return ratio_interval(values, [1.0] * len(values), groups, level, draws, seed)


def ratio_interval(
    sums: Sequence[float],
    counts: Sequence[float],
    groups: Sequence[int] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """``sum(sums) / sum(counts)`` with its percentile bootstrap interval: a mean over tokens, drawn by texts."""
    if len(sums) != len(counts) or (groups is not None and len(groups) != len(sums)):
        sizes = f"{len(sums)} sums, {len(counts)} counts, {'no' if groups is None else len(groups)} groups"
        raise UserError(f"an interval needs lists of one length, got {sizes}; give one entry per text in each.")
    top, bottom = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if not bottom.sum():
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(top.sum() / bottom.sum())
    if groups is not None:
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        top = np.bincount(index, weights=top).astype(np.float64)
        bottom = np.bincount(index, weights=bottom).astype(np.float64)
    if not math.isfinite(mean):
        return Interval(mean, mean, mean, len(sums))
    generator = np.random.default_rng(seed)
    # One draw at a time keeps memory at the number of texts, however many draws there are.
    means = []
    for _ in range(draws):
        drawn = generator.integers(0, len(top), len(top))
        if weight := bottom[drawn].sum():
            means.append(top[drawn].sum() / weight)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), len(sums))


def perplexity(logprobs: Sequence[Sequence[float]]) -> float:
    """``exp(-mean log p)`` over all tokens of all texts; ``logprobs`` are natural logarithms, one list per text."""
    count = sum(len(row) for row in logprobs)
    if not count:
        return math.nan
    return _exp(-sum(math.fsum(row) for row in logprobs) / count)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def evaluate_texts(
    rollouts: Sequence[Rollout],
    scores: Mapping[str, Score],
    reference_logprobs: ReferenceLogprobs | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """The figures of a set of texts, as one flat dict of numbers that JSON holds.

    Keys: ``score/<name>`` for each score, with ``score/<name>/low`` and ``/high`` (95%, drawn
    by prompt); ``perplexity`` with its ends where ``reference_logprobs`` is given; ``distinct_2``; ``length`` in
    sampled tokens, with ``length/median``, ``/min``, ``/max``; ``ended``, the share of texts that ended by themselves;
    ``texts`` and ``prompts``, their numbers.

    Args:
        scores: each takes the sampled texts, without their prompts, and gives as many numbers.
        reference_logprobs: gives for every rollout the log-probabilities of its sampled tokens under the reference.

    Raises:
        UserError: a score gave another number of values than texts, or one that is not finite.
    """
    texts = [rollout.text for rollout in rollouts]
    groups = _groups(rollouts)
    figures: dict[str, float] = {}
    for name, score in scores.items():
        interval = mean_interval(_score(name, score, rollouts), groups, seed=seed)
        figures |= _keys(f"score/{name}", interval)
    if reference_logprobs is not None:
        rows = reference_logprobs(list(rollouts)) if rollouts else []
        _same_length("reference_logprobs", len(rows), len(texts))
        interval = ratio_interval([math.fsum(row) for row in rows], [len(row) for row in rows], groups, seed=seed)
        figures["perplexity"] = perplexity(rows)
        figures["perplexity/low"], figures["perplexity/high"] = _exp(-interval.high), _exp(-interval.low)
    figures["distinct_2"] = distinct_n(texts)
    lengths = length_stats([sum(rollout.mask) for rollout in rollouts])
    figures["length"] = lengths.pop("mean")
    figures |= {f"length/{name}": value for name, value in lengths.items()}
    ended = [rollout.stop == "ended" for rollout in rollouts]
    figures["ended"] = sum(ended) / len(ended) if ended else math.nan
    return figures | {"texts": len(texts), "prompts": len(set(groups))}


def _groups(rollouts: Sequence[Rollout]) -> list[int]:
    """A number per prompt. Not ``rollout.group``: sampling in several calls may count groups from 0 again."""
    numbers: dict[tuple[str, str], int] = {}
    return [numbers.setdefault((rollout.prompt.id, rollout.prompt.text), len(numbers)) for rollout in rollouts]


def _score(name: str, score: Score, rollouts: Sequence[Rollout]) -> list[float]:
    values = [float(value) for value in score([rollout.text for rollout in rollouts])] if rollouts else []
    _same_length(f"the score {name!r}", len(values), len(rollouts))
    for value, rollout in zip(values, rollouts, strict=True):
        if not math.isfinite(value):
            raise UserError(
                f"the score {name!r} gave {value} for the text of prompt {rollout.prompt.id!r}; "
                "it must give a finite number for every text, the empty one included."
            )
    return values


def _same_length(what: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise UserError(f"{what} gave {got} values for {wanted} texts; give exactly one per text, in their order.")


def _keys(key: str, interval: Interval) -> dict[str, float]:
    return {key: interval.mean, f"{key}/low": interval.low, f"{key}/high": interval.high}


def reward_keys(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics to draw: ``reward/<source>`` in order of appearance, or ``reward`` where no source is named."""
    keys = dict.fromkeys(key for row in metrics for key in row if key.startswith("reward/"))
    return list(keys) or (["reward"] if any("reward" in row for row in metrics) else [])


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[Floats, Floats]:
    """Steps and values of one metric; a row without a step counts on from the last, what is no number is left out."""
    points: list[tuple[float, float]] = []
    step = 0.0
    for row in metrics:
        given, value = as_number(row.get("step")), as_number(row.get(key))
        step = given if math.isfinite(given) else step + 1
        if math.isfinite(value):
            points.append((step, value))
    steps, values = [point[0] for point in points], [point[1] for point in points]
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)


def as_number(value: object) -> float:
    """``value`` as a float, NaN where it is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return math.nan
    return float(value)


def smooth(values: Floats, window: int | None = None) -> Floats:
    """The mean over a window centred on each value, cut at both ends; by default a tenth of the series wide."""
    width = window or max(1, len(values) // 10)
    reach = width // 2
    return np.asarray([values[max(0, at - reach) : at + reach + 1].mean() for at in range(len(values))], np.float64)
