"""Experiment 1: rewards at once, rewards to go, one final reward and a final reward shared out, by length of the text.

Two tasks. "answers": before each token a cue is drawn, and the token should be the answer to it; no token changes what
a later one can earn. "key": the same, but the first token is a key. The poor key is paid at once; the rich key pays
nothing itself and makes every later right answer worth four times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from gru import Task, Texts
from lab import Arm, Course, race
from report import asked, compared, publish, say
from torch import Tensor

import instant_reward as ir

ANSWERS = torch.tensor([7, 12, 4, 9, 15, 0, 10, 14, 3, 6, 13, 8, 1, 5, 2, 11])  # to each cue its own
RICH, POOR = 0, 1
NOW, LESS = 0.2, 0.25  # what the poor key pays at once; what a right answer is worth without the rich key
THRESHOLD = 0.8

Pay = Callable[[Texts], Tensor]


def answers(texts: Texts, right_ones: Tensor = ANSWERS) -> Tensor:
    """What each token earns, ``[B, 2T]`` (cues nothing): its share of 1 where it is the right answer to its cue."""
    right = texts.tokens == right_ones[texts.tokens].roll(1, 1)
    return right * texts.on / texts.on.sum(1, keepdim=True)


def key(texts: Texts, right_ones: Tensor = ANSWERS) -> Tensor:
    """What each token earns, ``[B, 2T]``: at most 1 in all, with the rich key first and every later answer right."""
    first = texts.tokens[:, 1:2]
    worth = torch.where(first == RICH, 1.0, LESS)
    right = (texts.tokens == right_ones[texts.tokens].roll(1, 1)) * texts.on * worth
    right[:, 1] = NOW * (first[:, 0] == POOR)
    return right / (texts.on.sum(1, keepdim=True) - 1)


def arms(pay: Pay) -> Sequence[Arm]:
    """The same pay in four ways: with each token (its own alone, or all from it on), at the end, and shared out."""

    def total(texts: Texts) -> Tensor:
        return pay(texts).sum(1)

    def shared(texts: Texts) -> tuple[Tensor, Tensor]:
        share = total(texts) / texts.on.sum(1)
        end = torch.full_like(texts.tokens, texts.tokens.shape[1])  # known with the last token only
        return share[:, None].expand_as(texts.tokens), end

    dense = ir.reward(every="token", name="pay")(pay)
    return [
        Arm("instant", {"name": "instant"}, [dense]),
        Arm("reward to go", {"name": "rloo"}, [dense]),
        Arm("final", {"name": "rloo"}, [ir.reward(every="end", name="pay")(total)]),
        Arm(
            "uniform",
            {"name": "rloo", "biased_placement": "allow"},
            [ir.reward(every="token", name="pay", at="span")(shared)],
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs both tasks at every length and publishes one table for each."""
    told = asked(__doc__, arguments)
    course = Course(updates=6 if told.quick else 300, siblings=4 if told.quick else 8, until=THRESHOLD)
    tables, panels = {}, {}
    for name, pay in (("answers", answers), ("key", key)):
        for length in (2, 4) if told.quick else (4, 16, 64):
            size = len(ANSWERS)
            task = Task(size, length, torch.zeros(1, 1).long(), lambda texts, pay=pay: pay(texts).sum(1), cues=size)
            title = f"{name}, {length} tokens"
            say(title)
            results = race(task, arms(pay), course, told.seeds)
            scores = {one.name: one.scores for one in results}
            tables[title] = compared(scores, THRESHOLD, "final", {one.name: one.rate for one in results})
            panels[title] = scores
    publish("timing", told, tables, panels, THRESHOLD)


if __name__ == "__main__":
    main()
