"""Metrics against a reference at every word of a text: incremental, and by calling the libraries on each prefix.

    python benchmarks/metrics.py                    (needs the extra "test")
    python benchmarks/metrics.py --texts 64 --words 48 --rounds 3

Both sides score the same prefixes and must agree, or the program ends with an error. They take turns, and processor
time is measured, since others may use the machine; what counts is the ratio. References are prepared within that time,
on both sides. Where no library is named, the other side is this project's own score of each prefix from its beginning.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from instant_reward.rewards.metrics import Bleu, Chrf, EditSimilarity, ExactMatch, NumericAnswer, Rouge, TokenF1
from instant_reward.rewards.reference import Metric
from instant_reward.types import Prompt, View

RESULT = Path(__file__).parent / "results" / "metrics.md"
SYLLABLES = ["an", "the", "Mo", "ri", "ver", "sto", "al", "so"]
ENDS = ["", "", "s", "ing", ",", ".", "'t"]
WORDS = ["a", "of", "12", "3.5", "(to)"] + [f"{a}{b}{c}" for a in SYLLABLES for b in ["", *SYLLABLES] for c in ENDS]
CHARACTERS = "今天气很好我们去看电影故事人物音乐冬河城市医生问题答案简单安静奇怪，。"
Texts = list[tuple[list[str], str]]  # the prefixes of a text, and its reference


def texts(count: int, words: int, chinese: bool, seed: int) -> Texts:
    """Random texts in which two words of three are the reference's; both end with a number in English."""
    draw, made = random.Random(seed), []
    vocabulary, between = (list(CHARACTERS), "") if chinese else (WORDS, " ")
    for _ in range(count):
        reference = draw.choices(vocabulary, k=words)
        text = [word if draw.random() < 0.67 else draw.choice(vocabulary) for word in reference]
        if not chinese:
            reference[-1] = text[-1] = "12"
        prefixes = [between.join(text[: end + 1]) for end in range(words)]
        made.append((prefixes, between.join(reference)))
    return made


def incremental(metric: Metric, made: Texts) -> list[float]:
    """The score at every prefix, through the state that rewards are asked with."""
    found = []
    for prefixes, reference in made:
        about = Prompt("p", "", [], info={metric.reference: reference})
        state = metric.start(about)
        found += [metric.extend(state, View(prefix, "", about, about.info, done=False)) for prefix in prefixes]
    return found


def anew(score: Callable[[str, str], float], made: Texts) -> list[float]:
    """The score at every prefix, each from the beginning."""
    return [score(prefix, reference) for prefixes, reference in made for prefix in prefixes]


class ByCharacter:
    """What rouge-score needs to see Chinese."""

    def tokenize(self, text: str) -> list[str]:
        return [character for character in text if character.isalnum()]


def rouge(kind: str, chinese: bool) -> Callable[[str, str], float]:
    scorer = RougeScorer([kind], tokenizer=ByCharacter() if chinese else None)
    return lambda text, reference: float(scorer.score(reference, text)[kind].fmeasure)


def sacrebleu(metric: BLEU | CHRF) -> Callable[[str, str], float]:
    return lambda text, reference: float(metric.sentence_score(text, [reference]).score) / 100


def rows(chinese: bool) -> list[tuple[str, str, Callable[[], Metric], Callable[[str, str], float]]]:
    """What is compared: its name, the other side, a fresh metric, the other side's score."""
    zh = BLEU(tokenize="zh" if chinese else "13a", effective_order=True)
    own = "this project, from the beginning"
    made: list[tuple[str, str, Callable[[], Metric], Callable[[str, str], float]]] = [
        ("ROUGE-1", "rouge-score", lambda: Rouge(1), rouge("rouge1", chinese)),
        ("ROUGE-2", "rouge-score", lambda: Rouge(2), rouge("rouge2", chinese)),
        ("ROUGE-L", "rouge-score", lambda: Rouge("L"), rouge("rougeL", chinese)),
        ("BLEU", "sacrebleu", Bleu, sacrebleu(zh)),
        ("chrF", "sacrebleu", Chrf, sacrebleu(CHRF())),
        ("chrF++", "sacrebleu", lambda: Chrf(words=2), sacrebleu(CHRF(word_order=2))),
        ("token F1", own, TokenF1, TokenF1().score),
        ("exact match", own, ExactMatch, ExactMatch().score),
        ("edit similarity", own, EditSimilarity, EditSimilarity().score),
    ]
    if not chinese:
        made.append(("numeric answer", own, lambda: NumericAnswer("reference"), NumericAnswer().score))
    return made


def timed(work: Callable[[], list[float]]) -> tuple[float, list[float]]:
    begun = time.process_time()
    found = work()
    return (time.process_time() - begun) * 1000, found


def compare(
    name: str, fresh: Callable[[], Metric], score: Callable[[str, str], float], rounds: list[Texts]
) -> tuple[float, float]:
    """Median milliseconds of processor time of both sides.

    Each round has texts of its own: sacrebleu remembers what it cut before.
    """
    ours, theirs = [], []
    incremental(fresh(), rounds[0][:1])  # what is loaded and built once
    anew(score, rounds[0][:1])
    for made in rounds[1:]:
        one, values = timed(partial(incremental, fresh(), made))
        other, expected = timed(partial(anew, score, made))
        ours.append(one)
        theirs.append(other)
        worst = max(abs(a - b) for a, b in zip(values, expected, strict=True))
        if worst > 1e-12:
            raise SystemExit(f"{name}: the two sides differ by {worst}; look for the reason")
    return statistics.median(ours), statistics.median(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--words", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    lines = []
    for script in ("English", "Chinese"):
        chinese = script == "Chinese"
        seeds = range(options.rounds + 1)
        for number, (name, against, fresh, score) in enumerate(rows(chinese)):
            rounds = [texts(options.texts, options.words, chinese, 100 * number + seed) for seed in seeds]
            one, other = compare(name, fresh, score, rounds)
            lines.append(f"| {name} | {script} | {one:.1f} | {other:.0f} | {against} | {other / one:.0f} |")
            print(lines[-1], flush=True)
    prefixes = options.texts * options.words
    machine = {"processor": platform.machine(), "cores": os.cpu_count()} | {
        name: version(name) for name in ("sacrebleu", "rouge-score")
    }
    RESULT.parent.mkdir(exist_ok=True)
    head = f"""# Metrics at every word, incremental against anew

Written by `python benchmarks/metrics.py --texts {options.texts} --words {options.words} --rounds {options.rounds}`:
{prefixes:,} prefixes ({options.texts} texts of {options.words} words, or of as many characters in Chinese).
Milliseconds of processor time for all of them, medians. The values of both sides are equal to 1e-12.

| metric | script | incremental | anew | by | anew / incremental |
|---|---|---|---|---|---|
"""
    RESULT.write_text(head + "\n".join(lines) + f"\n\nMachine: {machine}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
