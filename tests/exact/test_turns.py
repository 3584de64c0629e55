"""Texts of several turns: what others write between sampled tokens changes no return, no advantage and no gradient.

The small world with words of others between its tokens (``turns``): they show nothing, and the policy's chances stay
what they are, so that every text keeps its probability and must keep its credit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.chosen import FIRST, JUNK, Chosen, true_values
from exact.turns import answered, by_parity
from exact.world import ALPHABETS, REINFORCE, World, chance, differ, same
from instant_reward.batch import Batch, collate
from instant_reward.credit import Source
from instant_reward.rewards.base import as_rewards
from instant_reward.types import Carried, Rollout

torch.set_num_threads(1)
FINAL = ir.reward(every="end", name="final")(lambda view: chance(view.text))
WORDS = ir.reward(every="word", name="words", discount=0.6, weight=2.0)(lambda view: chance(f"{view.text} word"))
PAIRS = ir.reward(every=2, name="pairs", discount=0.6)(lambda view: chance(view.text) * bool(view.piece))
ALL = [FINAL, WORDS, PAIRS]
DECISION = {"level": "decision", "most": None}


def phi(text: str) -> float:
    return 2.0 * chance(f"potential of {text}")


@pytest.fixture(scope="module")
def world() -> World:
    return World(ALPHABETS[1])


@pytest.fixture(scope="module")
def other() -> World:
    return World(ALPHABETS[1], seed=1)


def compact(values: Tensor, batch: Batch) -> Tensor:
    """Of the sampled tokens alone, text by text: ``[N]`` or ``[N, K]``."""
    return (values if values.dim() == 2 else values.permute(0, 2, 1))[batch.mask]


def in_turns(chosen: Chosen, last: bool = False, credit: bool = True) -> tuple[Batch, Batch]:
    """Every text once, in one turn and in several, annotated alike and credited; siblings are six in a row."""
    writer = chosen.world if chosen.sampler is None else chosen.sampler
    plain = [replace(one, group=number // 6) for number, one in enumerate(writer.rollouts(chosen.rewards))]
    turns = [answered(one, by_parity, chosen.rewards, last) for one in plain]
    batches = [
        collate(rollouts, chosen.algorithm.sources, dtype=torch.float64, pieces=chosen.config.pieces)
        for rollouts in (plain, turns)
    ]
    batch, split = chosen.annotate(batches[0]), batches[1]
    assert same(compact(split.old_logprobs, split), compact(batch.old_logprobs, batch))
    found: dict[str, Any] = {"carried": batch.carried, "fresh": batch.fresh, "bootstrap": batch.bootstrap}
    for name in ("values", "ref_logprobs", "proximal_logprobs", "teacher_logprobs"):
        values = getattr(batch, name)
        if values is not None:
            shape = (*values.shape[:-1], split.mask.shape[1])
            spread = torch.full(shape if values.dim() == 2 else (shape[0], shape[2], shape[1]), JUNK).double()
            spread[split.mask] = compact(values, batch)
            found[name] = spread if values.dim() == 2 else spread.permute(0, 2, 1)
    split = replace(split, sources=batch.sources, **found)
    return (chosen.algorithm.credit(batch), chosen.algorithm.credit(split)) if credit else (batch, split)


def step(world: World, batch: Batch) -> Tensor:
    """The expected step of a batch with every text once: sum over x of p(x) sum_t A_t grad log p(x_t)."""
    logprobs, weights = world.logprobs()[world.mask], world.probabilities().detach()
    texts = batch.mask.nonzero()[:, 0]
    total = (weights[texts] * compact(batch.advantages, batch) * logprobs).sum()
    (gradient,) = torch.autograd.grad(total, world.logits)
    return gradient


def built(world: World, other: World, case: str) -> Chosen:
    options = dict(CASES[case])
    discount, sampler = options.pop("discount", None), other if options.pop("sampler", False) else None
    rewards = ALL if discount is None else [one.but(discount=discount) for one in ALL]
    if options.pop("values", False):
        known = [*world.row_of, *map(tuple, world.texts)]
        options["values"] = [{prefix: chance(f"{source} {prefix}") for prefix in known} for source in range(3)]
    past = Carried(step=3, mean_return=0.7, mean_weight=0.3)
    return Chosen(world, rewards, sampler=sampler, reference=other, taught_by=other, carried=past, **options)


CRITIC = {"values": True, "critic": {"lam": 0.8}}
CASES: dict[str, dict[str, Any]] = {
    "reward to go": {"name": "reinforce"},
    "a running mean": {"name": "reinforce", "baseline": "running_mean"},
    "siblings by position": {"name": "rloo"},
    "whitened": {"name": "reinforce++"},
    "summed": {"name": "grpo", "timing": "ignore"},
    "own": {"name": "instant", "timing": "ignore"},
    "the best": {"name": "raft", "timing": "ignore"},
    "a penalty": {"name": "reinforce", "soft_length": 2},
    "a reference": {"name": "reinforce", "kl": 0.3},
    "a teacher": {"name": "reinforce", "teacher": {"model": "a teacher", "discount": 0.5}},
    "gae": {"name": "a2c", "lam": 0.7, **CRITIC},
    "gae by length": {"name": "ppo", "lam_length": 0.5, **CRITIC},
    "gae of pieces": {"name": "a2c", "lam": 0.7, "pieces": "word", **CRITIC},
    "a value": {"name": "reinforce", "baseline": "value", **CRITIC},
    "vtrace": {"name": "vtrace", "lam": 0.7, "sampler": True, **CRITIC},
    "vtrace of pieces": {"name": "vtrace", "lam": 0.7, "pieces": "word", "sampler": True, **CRITIC},
    "token ratios": {"name": "reinforce", "importance": "token", "sampler": True},
    "piece ratios": {"name": "rloo", "pieces": "word", "importance": "piece", "sampler": True},
    "whole ratios": {"name": "awr", "importance": "sequence", "sampler": True, **CRITIC},
    "ratios so far": {"name": "reinforce", "importance": DECISION, "sampler": True, "baseline": "value", **CRITIC},
    "ratios of pieces so far": {"name": "rloo", "importance": DECISION, "sampler": True, "pieces": "word"},
    "one step ahead": {"name": "ilql", "discount": 0.6, "values": True},
}


@pytest.mark.parametrize("last", [False, True], ids=["between", "and last"])
@pytest.mark.parametrize("case", CASES)
def test_what_others_write_is_passed_over(world: World, other: World, case: str, last: bool) -> None:
    """Rewards, returns, advantages, weights and targets of the sampled tokens are those of the text without the others.

    t+1 is the next sampled token; discounts, lambdas, lengths and positions count sampled tokens
    """
    plain, turns = in_turns(built(world, other, case), last)
    assert turns.mask.shape[1] > plain.mask.shape[1]
    for name in ("rewards", "returns", "advantages", "weights", "targets"):
        one, several = getattr(plain, name), getattr(turns, name)
        assert one is None or same(compact(several, turns), compact(one, plain)), name
    assert not turns.advantages[~turns.mask].any()


@pytest.mark.parametrize("case", ["reward to go", "siblings by position", "gae", "gae of pieces"])
def test_a_mask_that_is_ignored_is_caught(world: World, other: World, case: str) -> None:
    """Wrong on purpose: all that stands behind the prompt is taken for the policy's own."""
    chosen = built(world, other, case)
    plain, turns = in_turns(chosen, credit=False)
    place = torch.arange(turns.mask.shape[1])
    everything = (place >= FIRST) & (place < turns.length[:, None])
    wrong = chosen.algorithm.credit(replace(turns, mask=everything))
    assert differ(compact(wrong.advantages, turns), compact(chosen.algorithm.credit(plain).advantages, plain))


def scored(world: World, rewards: list[Any], last: bool, replayed: Callable[[Rollout], Rollout]) -> Batch:
    """The small world in turns, under reward-to-go; ``replayed`` is what the rewards are shown of each text."""
    named = as_rewards(rewards)
    turns = [answered(one, by_parity, [], last) for one in world.rollouts([])]
    turns = [replace(one, marks=ir.replay(named, replayed(one))) for one in turns]
    sources = [Source(one.name, one.weight, 1.0 if one.discount is None else one.discount) for one in named]
    return REINFORCE(collate(turns, sources, dtype=torch.float64))


def all_on(rollout: Rollout) -> Rollout:
    """Wrong on purpose: as if the policy had written all that stands behind the prompt."""
    return replace(rollout, mask=[t >= FIRST for t in range(len(rollout.mask))])


@pytest.mark.parametrize("last", [False, True], ids=["between", "and last"])
@pytest.mark.parametrize("every", ["token", "word", 2, 3])
@pytest.mark.parametrize("discount", [0.5, 1.0])
def test_shaping_leaves_the_gradient_as_it_was(world: World, every: Any, discount: float, last: bool) -> None:
    """With turns of others in between, potential shaping under a discount per sampled token still changes nothing.

    F_i = g phi_i - g**(1 - k_i) phi_{i-1},  k_i sampled tokens after the last payment
    """
    shaping, final = ir.potential(phi, discount, every), FINAL.but(discount=1.0)
    exact = world.gradient([chance(rollout.text) for rollout in world.rollouts([])])
    assert same(step(world, scored(world, [final], last, lambda one: one)), exact)
    assert same(step(world, scored(world, [final, shaping], last, lambda one: one)), exact)
    counted = step(world, scored(world, [final, shaping], last, all_on))
    # Words of others that are counted make other pieces of 2 and 3 tokens; with discount 1 any pieces are exact.
    assert same(counted, exact) if discount == 1.0 else float((counted - exact).abs().max()) > 1e-4


@pytest.mark.parametrize("every", ["token", "word", 1, 2, 3, "end"])
def test_a_view_counts_sampled_tokens(world: World, every: Any) -> None:
    """A reward is shown the same pieces, after the same number of sampled tokens, whatever others wrote in between."""
    seen: list[tuple[str, str, int, bool]] = []

    def spy(view: ir.View) -> float:
        seen.append((view.text, view.piece, view.sampled, view.done))
        return chance(f"{view.text} {view.sampled}")

    def shown(rollout: Rollout) -> list[tuple[str, str, int, bool]]:
        seen.clear()
        ir.replay([ir.reward(every=every, name="spy")(spy)], rollout)
        return list(seen)

    ignored = 0
    for rollout in world.rollouts([]):
        turns, wanted = answered(rollout, by_parity), shown(rollout)
        assert shown(turns) == wanted
        ignored += shown(all_on(turns)) != wanted
        if wanted:  # the empty text has no word
            told = shown(answered(rollout, by_parity, last=True))
            assert told[-1][2:] == wanted[-1][2:] == (sum(rollout.mask), True), "the end is told after as many"
    assert ignored > 10


def test_gae_and_pieces_are_exact(world: World) -> None:
    """In turns too, lambda 1 is exact with any values and every lambda with the true ones; so are words as actions.

    E[ sum_t grad log p(x_t) A_t ] = E[ sum_t grad log p(x_t) G[t] ]
    """
    plain = world.expected_step(ALL)
    any_values = [{prefix: 2.0 * chance(f"{number} {prefix}") for prefix in world.row_of} for number in range(3)]
    true = [true_values(world, [one.but(weight=1.0)])[0] for one in ALL]
    for lam, values in ((1.0, any_values), (0.0, true), (0.5, true)):
        assert same(step(world, in_turns(Chosen(world, ALL, name="a2c", lam=lam, values=values))[1]), plain)
    assert differ(step(world, in_turns(Chosen(world, ALL, name="a2c", lam=0.5, values=any_values))[1]), plain)
    undiscounted = [one.but(discount=1.0) for one in ALL]
    plain = world.expected_step(undiscounted)
    for options in ({"name": "reinforce"}, {"name": "a2c", "lam": 1.0, "values": any_values}):
        chosen = Chosen(world, undiscounted, pieces="word", **options)
        assert same(step(world, in_turns(chosen)[1]), plain)
