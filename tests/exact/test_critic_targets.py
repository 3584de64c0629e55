"""What the critic is told to learn, and what V-trace makes of another policy's texts: token by token and on average."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.chosen import (
    FIRST,
    Chosen,
    Values,
    expected_over_prefixes,
    gradient_of,
    log_table,
    true_values,
)
from exact.world import World, angle_differs, chance, differ, same
from instant_reward import credit
from instant_reward.batch import Batch

torch.set_num_threads(1)
FINAL = ir.reward(every="end", name="final")(lambda view: chance(view.text))
WORDS = ir.reward(every="word", name="words")(lambda view: chance(f"{view.text} word"))
TOKENS = ir.reward(every="token", name="tokens", weight=-0.5)(lambda view: chance(f"{view.text} {view.done}"))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def sampler() -> World:
    return World(seed=1)


def any_values(world: World, sources: int) -> list[Values]:
    """Values that mean nothing, of whole texts too: those are what is expected beyond a cut."""
    known = [*world.row_of, *map(tuple, world.texts)]
    return [{prefix: 2.0 * chance(f"{number} {prefix}") for prefix in known} for number in range(sources)]


def means(world: World, writer: World, of_tokens: Tensor) -> Tensor:
    """The mean of ``of_tokens [texts, L]`` over the texts at each prefix and next token: ``[prefixes, 3]``."""
    total = torch.zeros(len(world.row_of), 3, dtype=torch.float64)
    mass = torch.zeros_like(total)
    weights = writer.probabilities().detach()
    for row, text in enumerate(world.texts):
        for t, token in enumerate(text):
            place = (world.row_of[tuple(text[:t])], token)
            total[place] += weights[row] * of_tokens[row, FIRST + t]
            mass[place] += weights[row]
    return total / mass


def of_prefixes(world: World, values: Values) -> Tensor:
    return torch.tensor([values[prefix] for prefix in world.row_of], dtype=torch.float64)


def test_vtrace_of_the_preset_weighs_by_log_p_less_log_q(world: World, sampler: World) -> None:
    """The preset's advantages and targets are V-trace's of each source, at the ratio of the policy to the sampler.

    A = sum_k w_k vtrace(r_k, V_k, log p - log q; lambda);   targets_k = vtrace(r_k, V_k, log p - log q; the critic's)
    """
    rewards = [FINAL, WORDS.but(discount=0.6, weight=-1.5)]
    options: dict[str, Any] = {"name": "vtrace", "lam": 0.7, "critic": {"lam": 0.9}, "values": any_values(world, 2)}
    batch = Chosen(world, rewards, sampler=sampler, **options).batch()
    log_ratio = torch.where(world.mask, world.logprobs() - sampler.logprobs(), torch.nan).detach()

    def by_hand(ratio: Tensor) -> tuple[Tensor, Tensor]:
        advantages, targets = torch.zeros_like(ratio), []
        for index, (weight, discount) in enumerate(((1.0, 1.0), (-1.5, 0.6))):
            beyond = batch.bootstrap[:, index] if index == 1 else None  # of a final score nothing is left after a cut
            given = (batch.rewards[:, index], batch.values[:, index], ratio, world.mask, discount)
            advantages = advantages + weight * credit.vtrace(*given, 0.7, bootstrap=beyond)[0].nan_to_num()
            targets.append(credit.vtrace(*given, 0.9, bootstrap=beyond)[1])
        return advantages, torch.stack(targets, 1)

    advantages, targets = by_hand(log_ratio)
    assert same(batch.advantages, advantages)
    assert same(batch.targets, targets)
    for wrong in (-log_ratio, torch.zeros_like(log_ratio)):  # the ratio upside down; taken for the policy's own texts
        advantages, targets = by_hand(wrong)
        assert differ(batch.advantages, advantages)
        assert differ(batch.targets, targets)


def test_vtraces_targets_have_the_bounded_policys_value_as_their_fixed_point(world: World, sampler: World) -> None:
    """On average over the sampler's texts, the value of the policy between both is its own target, for every lambda.

    E_q[ target(x_<t) ] = V(x_<t)  where V is the value of the policy min(p, q) / sum of min(p, q)

    Espeholt et al. (2018), theorem 1: each error has the mean sum_a min(p, q)(a) (r + g V' - V) = 0.
    """
    between = World()
    with torch.no_grad():
        between.logits.copy_(torch.minimum(log_table(world), log_table(sampler)))
    rewards = [FINAL, WORDS.but(discount=0.6)]
    true = [true_values(between, [one])[0] for one in rewards]

    def expected(values: list[Values], lam: float, of: World = sampler, turned: bool = False) -> list[Tensor]:
        """The mean target at each prefix, by source; ``turned``: wrong on purpose, the ratio upside down."""
        chosen = Chosen(world, rewards, sampler=of, name="vtrace", critic={"lam": lam}, values=values)

        def upside_down(batch: Batch) -> Batch:
            batch = chosen.annotate(batch)
            mirrored = 2.0 * batch.old_logprobs - batch.proximal_logprobs
            return chosen.algorithm.credit(replace(batch, proximal_logprobs=mirrored))

        batch = chosen.batch()
        batch = upside_down(batch) if turned else batch
        own = log_table(sampler).detach().exp()
        return [(own * means(world, sampler, batch.targets[:, index])).sum(1) for index in range(2)]

    for lam in (0.0, 0.6, 1.0):
        for index, found in enumerate(expected(true, lam)):
            assert same(found, of_prefixes(world, true[index]))
            assert differ(expected(true, lam, turned=True)[index], found)
            assert differ(expected(true, lam, of=world)[index], found), "as if the policy had written the texts"
            of_policy = [true_values(world, [one])[0] for one in rewards]
            found = expected(of_policy, lam)[index]
            assert differ(found, of_prefixes(world, of_policy[index])), "the policy's own value is no fixed point"


def test_vtraces_step_takes_each_token_by_the_smaller_chance(world: World, sampler: World) -> None:
    """With the policy's true value and lambda 0, the expected step weighs each next token by the smaller chance.

    E_q[ sum_t min(1, p/q)(x_t) (r + g V' - V) grad log p(x_t) ] = E_q[ sum_t sum_a min(p, q)(a) A(a) grad log p(a) ]
    """
    rewards = [FINAL, WORDS.but(discount=0.6)]
    truth = [true_values(world, [one]) for one in rewards]
    chosen = Chosen(world, rewards, sampler=sampler, name="vtrace", lam=0.0, values=[one[0] for one in truth])
    worth = sum(table - of_prefixes(world, values)[:, None] for values, table in truth)
    smaller = torch.minimum(log_table(world), log_table(sampler)).detach().exp()

    def step(weights: Tensor) -> Tensor:
        return gradient_of(world, expected_over_prefixes(sampler, (weights * worth * log_table(world)).sum(1)))

    assert same(chosen.step(), step(smaller))
    ours, theirs = (log_table(one).detach().exp() for one in (world, sampler))
    assert angle_differs(chosen.step(), step(ours)), "unbounded"
    assert angle_differs(chosen.step(), step(theirs * (theirs / ours).clamp(max=1.0))), "the ratio upside down"


def recursion(paid: list[float], values: list[float], discount: float, lam: float, beyond: float) -> list[float]:
    """``target[t] = r[t] + discount * ((1 - lam) * V[t+1] + lam * target[t+1])``, both ``beyond`` after the end."""
    target, ahead, targets = beyond, beyond, []
    for r, value in zip(reversed(paid), reversed(values), strict=True):
        target = r + discount * ((1.0 - lam) * ahead + lam * target)
        ahead = value
        targets.append(target)
    return targets[::-1]


MANY = {"qac": {"critic": {"lam": 0.6}}, "ilql": {}}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("case", ["goes on", "final", "length", "switched off"])
def test_targets_of_next_tokens(world: World, name: str, case: str) -> None:
    """A critic of next tokens looks ahead to its own value, beyond a cut too, unless one of the sources was paid whole.

    target[t] = sum_k w_k r_k[t] + g ((1 - lambda) V[t+1] + lambda target[t+1]);   after the last token of a text that
    was cut off both are its value there if every source goes on, else 0
    """
    discount = 1.0 if case == "length" else 0.8  # the length penalty has discount 1, and there is one value for all
    rewards = [(FINAL if case == "final" else WORDS).but(weight=2.0), TOKENS]
    critic = {**MANY[name].get("critic", {}), **({"bootstrap": False} if case == "switched off" else {})}
    soft = {"soft_length": 2} if case == "length" else {}
    known = any_values(world, 1)
    table = torch.tensor([[chance(f"{prefix} {token}") for token in range(3)] for prefix in world.row_of]).double()
    source = {"values": known} if name == "ilql" else {"table": table}
    chosen = Chosen(world, rewards, name=name, discount=discount, critic=critic, **soft, **source)
    assert chosen.algorithm.needs.critic.beyond == (case == "goes on")
    batch = chosen.annotate(chosen.batch())
    beyond = torch.tensor([known[0][tuple(text)] for text in world.texts]).double() * batch.cut_off
    batch = chosen.algorithm.credit(replace(batch, bootstrap=beyond[:, None]))

    def by_hand(discount: float, goes_on: bool) -> Tensor:
        found, lam = torch.zeros_like(batch.advantages), 0.6 if name == "qac" else 0.0
        weights = torch.tensor([one.weight for one in batch.sources], dtype=torch.float64)
        for row, on in enumerate(batch.mask):
            paid = (weights[:, None] * batch.rewards[row]).sum(0)[on].tolist()
            values, after = batch.values[row, 0][on].tolist(), float(beyond[row]) if goes_on else 0.0
            found[row, on] = torch.tensor(recursion(paid, values, discount, lam, after), dtype=torch.float64)
        return found

    assert same(batch.targets[:, 0], by_hand(discount, case == "goes on"))
    assert differ(batch.targets[:, 0], by_hand(discount, case != "goes on")), "what lies beyond a cut"
    assert differ(batch.targets[:, 0], by_hand(0.8 if case == "length" else 1.0, case == "goes on")), "the discount"


def test_the_true_q_is_its_own_target(world: World) -> None:
    """One step ahead, the mean target of each prefix and next token is the true Q, whatever the discount.

    E[ r[t] + g V(x_<=t) | x_<t, x_t ] = Q(x_<t, x_t),   V = sum_a p(a) Q(a)
    """
    rewards = [FINAL.but(weight=2.0, discount=0.6), TOKENS.but(discount=0.6)]
    values, table = true_values(world, rewards)
    for name, source in (("qac", {"table": table, "critic": {"lam": 0.0}}), ("ilql", {"values": [values]})):
        batch = Chosen(world, rewards, name=name, **source).batch()
        assert same(means(world, world, batch.targets[:, 0]), table)
        undiscounted = [one.but(discount=1.0) for one in rewards]
        batch = Chosen(world, undiscounted, name=name, **source).batch()
        assert differ(means(world, world, batch.targets[:, 0]), table), "another discount"


@pytest.mark.parametrize("pieces", [None, "word"])
def test_a_learned_baseline_learns_the_rewards_as_they_are(world: World, sampler: World, pieces: Any) -> None:
    """Per decision the rewards are weighed by the ratio so far; the critic that is the baseline learns them unweighed.

    target_k[t] = r_k[t] + g_k ((1 - lambda) V_k[t+1] + lambda target_k[t+1]),  t a token, or where words are the
    actions a word, whose target each of its tokens has
    """
    rewards = [FINAL, WORDS.but(discount=0.6, weight=2.0)]
    options: dict[str, Any] = {"name": "reinforce", "baseline": "value", "critic": {"lam": 0.6}, "pieces": pieces}
    chosen = Chosen(
        world, rewards, sampler=sampler, values=any_values(world, 2), importance={"level": "decision"}, **options
    )
    batch = chosen.batch()
    found, weighed = torch.zeros_like(batch.targets), torch.zeros_like(batch.targets)
    log_ratio = torch.where(batch.mask, batch.proximal_logprobs - batch.old_logprobs, 0.0)
    for row, on in enumerate(batch.mask):
        places = on.nonzero().flatten().tolist()
        actions: dict[int, list[int]] = {}
        for t in places:
            actions.setdefault(t if pieces is None else int(batch.pieces[row, t]), []).append(t)
        for index, discount in enumerate((1.0, 0.6)):
            paid = [float(batch.rewards[row, index, tokens].sum()) for tokens in actions.values()]
            values = [float(batch.values[row, index, tokens[0]]) for tokens in actions.values()]
            so_far = [float(log_ratio[row, : tokens[-1] + 1].sum().exp().clamp(max=2.0)) for tokens in actions.values()]
            times = [r * ratio for r, ratio in zip(paid, so_far, strict=True)]
            for into, given in ((found, paid), (weighed, times)):
                targets = recursion(given, values, discount, 0.6, 0.0)
                for tokens, target in zip(actions.values(), targets, strict=True):
                    into[row, index, tokens] = target
    assert same(batch.targets, found)
    assert differ(batch.targets, weighed), "weighed, as the policy sees them"
    plain = Chosen(world, rewards, values=any_values(world, 2), **options).batch()
    assert same(batch.targets, plain.targets), "whoever wrote the texts"
    assert differ(batch.advantages, plain.advantages)
