"""An encoder-decoder's expected step is the gradient of its enumerated objective, encoder included."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from instant_reward.batch import collate
from instant_reward.credit import Source
from instant_reward.crediting import credit_batch
from instant_reward.losses import policy_gradient
from instant_reward.presets import Preset
from instant_reward.types import Mark, Prompt, Rollout
from tiny_seq2seq import IDS, KINDS, tiny_seq2seq

LONGEST = 2
PLAIN = Preset("to_go", "none", "none", "policy_gradient", "text")
SCORES = torch.randn(9, 9, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def texts() -> list[list[int]]:
    """Every text of up to two tokens: the vocabulary has nine, of which one ends a text."""
    end = IDS["eos_token_id"]
    longer = [list(pair) for pair in product(range(IDS["vocab_size"]), repeat=LONGEST) if pair[0] != end]
    return [[end], *longer]


def written(prompt: Prompt, ids: list[int], group: int) -> Rollout:
    """A text with a reward at each token, which hangs on what was written so far and on the source."""
    first = len(prompt.token_ids)
    marks = [
        Mark(float(SCORES[ids[0], ids[at] if at else 0, group] + at), first + at, first + at + 1, "r", first + at + 1)
        for at in range(len(ids))
    ]
    return Rollout(
        id=f"{prompt.id}/0",
        group=group,
        prompt=prompt,
        token_ids=[*prompt.token_ids, *ids],
        mask=[False] * first + [True] * len(ids),
        logprobs=[0.0] * (first + len(ids)),
        char_ends=[0] * (first + len(ids)),
        text="",
        marks=marks,
        versions=[-1] * first + [0] * len(ids),
        stop="ended" if ids[-1] == IDS["eos_token_id"] else "length",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_step_is_the_gradient_of_the_enumerated_objective(kind: str) -> None:
    """Sum over texts of p(x) grad loss(x) = - grad of sum over texts of p(x) R(x), for two sources at once."""
    policy = tiny_seq2seq(kind)
    prompts = policy.prompts([{"prompt": "abc"}, {"prompt": "e"}], "prompt", LONGEST)
    rollouts = [written(prompt, ids, group) for group, prompt in enumerate(prompts) for ids in texts()]
    batch = credit_batch(collate(rollouts, [Source("r", 1.0, 1.0)], policy.pad_id, torch.float64), preset=PLAIN)
    logprobs = policy(batch).logprobs
    chances = logprobs.sum(1).exp()
    parameters = [one for one in policy.model.parameters() if one.requires_grad]
    if not policy.model.generation_config.bad_words_ids:
        assert float(chances.detach().sum()) == pytest.approx(len(prompts), abs=1e-10)
    rewards = torch.tensor([sum(mark.value for mark in one.marks) for one in rollouts], dtype=torch.float64)
    objective = torch.autograd.grad((chances * rewards).sum(), parameters, retain_graph=True, allow_unused=True)
    weights = chances.detach()
    total = torch.zeros((), dtype=torch.float64)
    for row, weight in enumerate(weights):
        part = replace(batch.select([row]), text_count=1, token_count=int(batch.mask[row].sum()))
        total = total + weight * policy_gradient(logprobs[row : row + 1, : part.token_ids.shape[1]], part).loss
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    moved = 0
    for one, other in zip(found, objective, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.allclose(-one, other, rtol=0.0, atol=1e-10)
            moved += bool(other.abs().max() > 1e-6)
    assert moved > len(parameters) // 2
