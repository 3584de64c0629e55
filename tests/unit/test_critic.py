"""The critic of a policy: which text each value is of, where it begins, what its gradient reaches, its slow copy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact import models
from exact.world import chance, same
from instant_reward import algorithms
from instant_reward.batch import Batch, collate
from instant_reward.config import AlgorithmConfig
from instant_reward.credit import Source
from instant_reward.policies.causal import CausalPolicy
from instant_reward.policies.critic import mean_returns
from instant_reward.policies.optimizer import Optimization
from instant_reward.rewards.base import as_rewards
from instant_reward.sampling.draw import Settings
from instant_reward.types import CriticNeed, Mark, Needs, Rollout

SETTINGS = Settings(max_new_tokens=6, min_new_tokens=2, temperature=0.8)
WORDS = ir.reward(every="word", name="words", weight=2.0, discount=0.9)(lambda view: chance(view.text))
FINAL = ir.reward(every="end", name="final")(lambda view: chance(f"{view.text} end"))
REWARDS = [WORDS, FINAL]
SOURCES = [Source("words", 2.0, 0.9), Source("final", final=True)]


def prepared(need: CriticNeed, rate: float = 1e-2, **other: object) -> tuple[CausalPolicy, list[Rollout]]:
    """A policy with a critic whose heads are no longer 0, and texts; some are cut off."""
    policy = models.policy()
    rollouts = models.sample(policy, models.prompts(9, 3, 5), SETTINGS, 3, REWARDS)
    assert {rollout.stop for rollout in rollouts} == {"ended", "length"}
    policy.prepare(Optimization(learning_rate=rate), Needs(critic=need, **other))
    return policy, rollouts


def stir(policy: CausalPolicy, seed: int = 0) -> None:
    """Gives the critic weights that are not 0, and marks it as begun."""
    assert policy.critic is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        policy.critic.begun.fill_(True)
        for name, parameter in policy.critic.named_parameters():
            if not name.startswith("base"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def as_batch(rollouts: list[Rollout], policy: CausalPolicy) -> Batch:
    return collate(rollouts, SOURCES, policy.pad_id, dtype=torch.float64)


def by_hand(policy: CausalPolicy, ids: list[int]) -> Tensor:
    """The values of the text ``ids``, ``[K]``: its own forward pass, the state of its last token."""
    critic = policy.critic
    assert critic is not None
    base = critic.base if critic.base is not None else policy.model.model
    with torch.no_grad():
        state = base(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        if critic.value is not None:
            return critic.values(state[None])[0]
        logits = policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] / 0.8
        chances = logits.softmax(-1)
        return (chances * critic.table(state[None])(slice(0, 1))[0]).sum()[None]


NEEDS = [
    CriticNeed("copy", outputs=2),
    CriticNeed("head", outputs=2, detach=False),
    CriticNeed("copy", outputs=1, tables=1),
    CriticNeed("head", outputs=1, tables=2, target_rate=0.5),
]


@pytest.mark.parametrize("need", NEEDS, ids=["copy", "head", "table", "tables"])
def test_values_are_of_the_text_before_each_token(need: CriticNeed) -> None:
    """``values[t]`` is of the tokens before t, prompt included; the bootstrap of all of them. Padding plays no part."""
    policy, rollouts = prepared(need)
    stir(policy)
    rollouts = [replace(rollout, forbidden_end=0) for rollout in rollouts]
    batch = policy.annotate(as_batch(rollouts, policy))
    assert batch.values.shape == (len(batch), need.outputs, batch.mask.shape[1])
    for row, rollout in enumerate(rollouts):
        for t in range(rollout.start, len(rollout.token_ids)):
            wanted = by_hand(policy, rollout.token_ids[:t])
            assert same(batch.values[row, :, t], wanted)
            assert not same(by_hand(policy, rollout.token_ids[: t + 1]), wanted), "an index off by one is seen"
        beyond = by_hand(policy, rollout.token_ids)
        assert same(batch.bootstrap[row], beyond if rollout.stop == "length" else torch.zeros_like(beyond))
    assert not batch.values[~batch.mask[:, None].expand_as(batch.values)].any()
    for tokens in (1, 30):
        again = policy.annotate(as_batch(rollouts, policy), tokens)
        assert same(again.values, batch.values)
        assert same(again.bootstrap, batch.bootstrap)


def test_the_bootstrap_is_the_value_of_a_text_one_token_longer() -> None:
    """What lies beyond a cut is what would be said before the next token, had there been one, whichever it were."""
    policy, rollouts = prepared(NEEDS[0])
    stir(policy)
    cut = [rollout for rollout in rollouts if rollout.stop == "length"]
    bootstrap = policy.annotate(as_batch(cut, policy)).bootstrap
    for token in (70, policy.end_ids[0]):
        longer = policy.annotate(as_batch([_longer(rollout, token) for rollout in cut], policy))
        ends = torch.tensor([len(rollout.token_ids) for rollout in cut])
        assert same(bootstrap, longer.values[torch.arange(len(cut)), :, ends])


def _longer(rollout: Rollout, token: int) -> Rollout:
    return replace(
        rollout,
        token_ids=[*rollout.token_ids, token],
        mask=[*rollout.mask, True],
        logprobs=[*rollout.logprobs, 0.0],
        char_ends=[*rollout.char_ends, rollout.char_ends[-1]],
        versions=[*rollout.versions, 0],
    )


@pytest.mark.parametrize("need", NEEDS[:3], ids=["copy", "head", "table"])
def test_a_critic_begins_as_the_mean(need: CriticNeed) -> None:
    """At first every value is the mean reward-to-go of the first batch, and of no later one.

    V = (1 / tokens) sum_t G_k[t]
    """
    policy, rollouts = prepared(need)
    batch = as_batch(rollouts, policy)
    means = mean_returns(batch)
    total = torch.zeros(2, dtype=torch.float64)
    for rollout in rollouts:
        sampled = range(rollout.start, len(rollout.token_ids))
        for k, (name, discount) in enumerate((("words", 0.9), ("final", 1.0))):
            marks = [mark for mark in rollout.marks if mark.source == name]
            total[k] += sum(m.value * discount ** (m.seen - 1 - t) for t in sampled for m in marks if m.seen > t)
    assert same(means, total / int(batch.mask.sum()))
    wanted = means if need.outputs == 2 else (2.0 * means[0] + means[1])[None]
    values = policy.annotate(batch).values
    for row, t in batch.mask.nonzero().tolist():
        assert same(values[row, :, t], wanted)
    other = as_batch([replace(rollout, marks=[]) for rollout in rollouts], policy)
    assert same(policy.annotate(other).values, values), "it begins once"


def gradients(policy: CausalPolicy, loss: Tensor) -> set[str]:
    """Where the gradient of a loss comes to."""
    policy.model.zero_grad()
    assert policy.critic is not None
    policy.critic.zero_grad()
    policy.backward(loss)
    found = [("policy", policy.model.named_parameters()), ("critic", policy.critic.named_parameters())]
    reached = {
        f"{of}/{'base' if of == 'critic' and name.startswith('base') else 'heads' if of == 'critic' else 'trunk'}"
        for of, parameters in found
        for name, parameter in parameters
        if parameter.grad is not None and parameter.grad.any()
    }
    return reached


def test_what_the_critics_error_moves() -> None:
    """A copy moves its own trunk, an attached head the policy's, a detached head nothing but itself."""
    wanted = {
        ("copy", True): {"critic/base", "critic/heads"},
        ("head", False): {"critic/heads", "policy/trunk"},
        ("head", True): {"critic/heads"},
    }
    for (model, detach), reached in wanted.items():
        policy, rollouts = prepared(CriticNeed(model, outputs=2, detach=detach))
        stir(policy)
        batch = as_batch(rollouts, policy)
        output = policy(batch)
        assert gradients(policy, (output.values**2).sum()) == reached, (model, detach)
        assert gradients(policy, policy(batch).logprobs.sum()) == {"policy/trunk"}, "the policy's loss moves no critic"


def test_a_sum_over_next_tokens_moves_the_policy_alone() -> None:
    """The sum does not change Q to grow larger itself; an attached Q moves the policy's trunk by its own error."""
    policy, rollouts = prepared(CriticNeed("head", tables=1, detach=False), top_actions=0)
    stir(policy)
    batch = as_batch(rollouts, policy)
    assert gradients(policy, policy(batch).expected.sum()) == {"policy/trunk"}
    assert gradients(policy, policy(batch).chosen.sum()) == {"critic/heads", "policy/trunk"}


def test_a_copy_shares_nothing_with_the_policy() -> None:
    """Its trunk begins as the policy's, and each then steps on its own, with learning rates and norms of their own."""
    policy, rollouts = prepared(CriticNeed("copy", outputs=2, learning_rate=0.5))
    stir(policy)
    assert policy.critic is not None
    assert policy.critic.base is not None
    ours, theirs = policy.model.model.state_dict(), policy.critic.base.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name])
        assert tensor.data_ptr() != theirs[name].data_ptr()
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    policy.backward((policy(as_batch(rollouts, policy)).values ** 2).sum())
    said = policy.step()
    assert said["grad_norm"] == 0.0
    assert said["critic_grad_norm"] > 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
    moved = policy.critic.base.state_dict()
    assert any(not torch.equal(moved[name], tensor) for name, tensor in policy.model.model.state_dict().items())
    assert policy.stepper is not None
    assert [group["lr"] for group in policy.stepper.optimizer.param_groups] == [1e-2, 0.5]


def test_the_slow_q_follows() -> None:
    """After each step the slow Q functions go so far towards the quick ones; no gradient moves them.

    slow <- slow + rate (quick - slow)
    """
    policy, rollouts = prepared(CriticNeed("copy", tables=2, target_rate=0.25))
    batch = policy.annotate(as_batch(rollouts, policy))
    assert policy.critic is not None
    assert policy.critic.slow is not None
    assert same(batch.slow[batch.mask], policy(batch).chosen.amin(1)[batch.mask]), "at first they are the same"
    before = [one.weight.clone() for one in policy.critic.slow.all()]
    policy.backward((policy(batch).chosen ** 2).sum() + policy(batch).spread.sum())
    policy.step()
    for slow, quick, was in zip(policy.critic.slow.all(), policy.critic.tables.all(), before, strict=True):
        assert not same(quick.weight, was)
        assert same(slow.weight, was + 0.25 * (quick.weight - was))
        assert slow.weight.grad is None
    again = policy.annotate(batch)
    assert not same(again.slow, batch.slow)


def test_chosen_and_spread_are_of_the_sampled_tokens() -> None:
    """``chosen`` is each Q's value of the token that was drawn, ``spread`` its log-sum-exp over the vocabulary."""
    policy, rollouts = prepared(CriticNeed("copy", tables=2, target_rate=0.5))
    stir(policy)
    assert policy.critic is not None
    assert policy.critic.base is not None
    output = policy(as_batch(rollouts, policy))
    for row in (0, 4):
        ids = rollouts[row].token_ids
        for t in range(rollouts[row].start, len(ids)):
            state = policy.critic.base(input_ids=torch.tensor([ids[:t]]), use_cache=False).last_hidden_state[0, -1:]
            tables = [policy.critic.table(state, number)(slice(0, 1))[0] for number in range(2)]
            assert same(output.chosen[row, :, t], torch.stack([table[ids[t]] for table in tables]))
            assert same(output.spread[row, :, t], torch.stack([table.logsumexp(0) for table in tables]))


def test_what_others_wrote_is_read_and_not_rated() -> None:
    """Between sampled tokens others may speak: values, returns and advantages pass over, and the text is read whole."""
    policy, rollouts = prepared(NEEDS[0])
    stir(policy)
    turns = [_answered(rollout) for rollout in rollouts[:4]]
    assert all(False in turn.mask[turn.start :] for turn in turns)
    config = AlgorithmConfig(name="a2c", lam=0.7, critic={"bootstrap": False})
    algorithm = algorithms.build(config, as_rewards(REWARDS), 6)
    batch = algorithm.credit(policy.annotate(collate(turns, algorithm.sources, policy.pad_id, dtype=torch.float64)))
    for row, turn in enumerate(turns):
        sampled = [t for t in range(len(turn.token_ids)) if turn.mask[t]]
        wanted = torch.zeros(len(sampled), dtype=torch.float64)
        for k, (weight, discount) in enumerate(((2.0, 0.9), (1.0, 1.0))):
            values = [float(by_hand(policy, turn.token_ids[:t])[k]) for t in sampled]
            paid = [0.0] * len(sampled)
            for mark in turn.marks:
                if mark.source == SOURCES[k].name:
                    paid[max(i for i, t in enumerate(sampled) if t <= mark.seen - 1)] += mark.value
            ahead, running = [*values[1:], 0.0], 0.0
            for i in reversed(range(len(sampled))):
                running = paid[i] + discount * ahead[i] - values[i] + discount * 0.7 * running
                wanted[i] += weight * running
        assert same(batch.advantages[row, sampled], wanted)
        assert not batch.advantages[row][~batch.mask[row]].any()
    logprobs = policy(batch).logprobs
    for row, turn in enumerate(turns):
        whole = (
            policy.model(input_ids=torch.tensor([turn.token_ids]), use_cache=False).logits[0].div(0.8).log_softmax(-1)
        )
        for t in [t for t in range(len(turn.token_ids)) if turn.mask[t] and not batch.no_end[row, t]]:
            assert same(logprobs[row, t], whole[t - 1, turn.token_ids[t]])


def _answered(rollout: Rollout) -> Rollout:
    """The same text with three tokens of somebody else after the second one, and one more at its end."""
    at, others = rollout.start + 2, [65, 66, 67]

    def grown(values: list, fill: list, last: object) -> list:
        return [*values[:at], *fill, *values[at:], last]

    shift = [mark if mark.seen <= at else replace(mark, seen=mark.seen + 3, end=mark.end + 3) for mark in rollout.marks]
    late = Mark(0.37, rollout.start, at, "words", at + 2)  # seen while somebody else spoke: paid at the token before
    return replace(
        rollout,
        token_ids=grown(rollout.token_ids, others, 68),
        mask=grown(rollout.mask, [False] * 3, False),
        logprobs=grown(rollout.logprobs, [0.0] * 3, 0.0),
        char_ends=grown(rollout.char_ends, [rollout.char_ends[at - 1]] * 3, rollout.char_ends[-1]),
        versions=grown(rollout.versions, [-1] * 3, -1),
        marks=[*shift, late],
    )
