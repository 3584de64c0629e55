"""What holds a policy back: KL losses, the entropy bonus, the soft length penalty, weights that follow a target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.chosen import Chosen, expected_over_prefixes, gradient_of, log_table
from exact.world import LONGEST, World, angle_differs, chance, differ, same
from instant_reward import carried, credit
from instant_reward.batch import Batch
from instant_reward.config import AlgorithmConfig
from instant_reward.types import Carried, LossOutput

torch.set_num_threads(1)
FINAL = ir.reward(every="end", name="final")(lambda view: chance(view.text))
NOTHING = ir.reward(every="end", name="nothing")(lambda view: 0.0)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def reference() -> World:
    return World(seed=1)


def undivided(chosen: Chosen, each_part: Any = lambda part: part) -> Any:
    """The loss with its sum over tokens undivided, so that the length of a text plays no part."""

    def loss(logprobs: Tensor, part: Batch) -> LossOutput:
        return chosen.loss(logprobs, replace(each_part(part), token_count=1))

    return loss


def held(world: World, reference: World, **options: Any) -> Chosen:
    return Chosen(world, [NOTHING], name="reinforce", reference=reference, kl=0.7, **options)


def test_k2_as_a_loss_is_the_kl_at_each_prefix(world: World, reference: World) -> None:
    """The squared log-ratio as a loss: on average the gradient of the KL at each prefix, the prefixes held fixed.

    E[ grad 1/2 log(p / q)(x_t)**2 | x_<t ] = sum_a p(a) log(p / q)(a) grad log p(a) = grad KL(p, q | x_<t)
    """
    ours, theirs = log_table(world), log_table(reference).detach()
    kl = (ours.exp() * (ours - theirs)).sum(1)
    wanted = -0.7 * gradient_of(world, expected_over_prefixes(world, kl))
    k2 = held(world, reference, kl_as="loss", kl_estimator="k2")
    assert same(k2.step(loss=undivided(k2)), wanted)

    whole = held(world, reference, kl_as="reward").step()
    assert angle_differs(wanted, whole), "paid as a reward, the KL also counts the prefixes that a token leads to"

    def one_late(part: Batch) -> Batch:
        """Wrong on purpose: the reference's log-probabilities one token too late."""
        return replace(part, ref_logprobs=part.ref_logprobs.roll(1, dims=1))

    assert angle_differs(k2.step(loss=undivided(k2, one_late)), wanted)


def test_k3_as_a_loss_is_the_other_kl(world: World, reference: World) -> None:
    """The bounded estimate as a loss: on average the gradient of KL(q, p) at each prefix; in value it is KL(p, q).

    E[ grad (q/p - 1 - log q/p)(x_t) | x_<t ] = E[ (1 - q/p) grad log p ] = -sum_a q(a) grad log p(a) = grad KL(q, p)
    """
    ours, theirs = log_table(world), log_table(reference).detach()
    other = (theirs.exp() * (theirs - ours)).sum(1)
    wanted = -0.7 * gradient_of(world, expected_over_prefixes(world, other))
    k3 = held(world, reference, kl_as="loss", kl_estimator="k3")
    assert same(k3.step(loss=undivided(k3)), wanted)
    k2 = held(world, reference, kl_as="loss", kl_estimator="k2")
    assert angle_differs(k2.step(loss=undivided(k2)), wanted)

    batch, weights = k3.batch(), world.probabilities().detach()
    values = [
        float(weights[row] * k3.loss(world.logprobs()[row : row + 1], replace(part, token_count=1)).loss.detach())
        for row, part in ((row, _only(batch, row)) for row in range(len(batch)))
    ]
    kl = expected_over_prefixes(world, (ours.exp() * (ours - theirs)).sum(1).detach())
    assert sum(values) == pytest.approx(0.7 * float(kl), abs=1e-10)


def _only(batch: Batch, row: int) -> Batch:
    part = batch.select([row])
    wide = batch.mask.shape[1] - part.mask.shape[1]

    def padded(values: Tensor, fill: float = 0.0) -> Tensor:
        return torch.nn.functional.pad(values, (0, wide), value=fill)

    return replace(
        part,
        text_count=1,
        token_ids=padded(part.token_ids),
        mask=padded(part.mask),
        old_logprobs=padded(part.old_logprobs),
        advantages=padded(part.advantages),
        ref_logprobs=padded(part.ref_logprobs, 7.0),
    )


def test_the_kl_of_texts_that_another_policy_wrote(world: World, reference: World) -> None:
    """Off-policy the log-ratio is that of the policy which learns, not the sampler's; weighed, it is exact.

    E_s[ p/s(x) sum_t grad log p(x_t) sum_{u >= t} -log(p / q)(x_u) ] = -grad KL(p, q)
    """
    ours, theirs = (torch.where(w.mask, w.logprobs(), 0.0).sum(1) for w in (world, reference))
    exact = -0.7 * gradient_of(world, (world.probabilities() * (ours - theirs.detach())).sum())
    assert same(held(world, reference).step(), exact)
    for level in ("sequence", "decision"):
        off = held(world, reference, sampler=World(seed=2), importance={"level": level, "most": None})
        assert same(off.step(), exact), level

    def of_sampler(batch: Batch) -> Batch:
        """Wrong on purpose: the sampler's part of the log-ratio."""
        batch = off.annotate(batch)
        moved = batch.ref_logprobs + batch.proximal_logprobs - batch.old_logprobs
        return off.algorithm.credit(replace(batch, ref_logprobs=moved))

    assert angle_differs(off.step(credit=of_sampler), exact)


def test_the_entropy_bonus_is_its_gradient(world: World) -> None:
    """The bonus raises the entropy at each sampled prefix, the prefixes held fixed, and is undivided by chance.

    loss = -w sum_t H(p | x_<t):  step = w E[ sum_t grad H(p | x_<t) ]
    """
    ours = log_table(world)
    wanted = 0.3 * gradient_of(world, expected_over_prefixes(world, -(ours.exp() * ours).sum(1)))
    bonus = Chosen(world, [NOTHING], name="reinforce", entropy=0.3)
    assert same(bonus.step(loss=undivided(bonus)), wanted)
    both = Chosen(world, [FINAL], name="reinforce", entropy=0.3)
    assert same(both.step(loss=undivided(both)), wanted + world.expected_step([FINAL]))

    def sampled(logprobs: Tensor, part: Batch) -> LossOutput:
        """Wrong on purpose: -log p of the sampled tokens as if it were the entropy: no gradient on average."""
        return LossOutput(0.3 * torch.where(part.mask, logprobs, 0.0).sum())

    step = bonus.step(loss=sampled)
    assert same(step, torch.zeros_like(step))


def test_the_entropy_as_a_reward_is_the_gradient_of_the_texts_entropy(world: World) -> None:
    """-log p of each sampled token, reward-to-go: the entropy of whole texts, later prefixes included.

    E[ sum_t grad log p(x_t) sum_{u >= t} -log p(x_u) ] = grad H(texts), since E[ grad log p(x) ] = 0
    """
    ours = torch.where(world.mask, world.logprobs(), 0.0).sum(1)
    wanted = 0.3 * gradient_of(world, -(world.probabilities() * ours).sum())
    paid = Chosen(world, [NOTHING], name="reinforce", entropy=0.3, entropy_as="reward")
    assert same(paid.step(), wanted)
    assert [source.name for source in paid.algorithm.sources] == ["nothing", "entropy"]
    at_prefixes = Chosen(world, [NOTHING], name="reinforce", entropy=0.3)
    assert angle_differs(at_prefixes.step(loss=undivided(at_prefixes)), wanted), "it leaves out where a token leads"
    followed = Chosen(
        world, [NOTHING], name="reinforce", entropy=0.3, entropy_as="reward", carried=Carried(step=1, entropy=0.6)
    )
    assert same(followed.step(), 2.0 * wanted)


def test_the_soft_length_penalty(world: World) -> None:
    """A text pays for each token within ``soft`` of the longest length, on its last token: a final reward.

    0 up to longest - soft;  (longest - soft - length) / soft beyond, at least -1
    """
    chosen = Chosen(world, [FINAL], name="reinforce", soft_length=3)
    penalty = {1: 0.0, 2: -1 / 3, 3: -2 / 3, 4: -1.0}
    total = [chance(r.text) + penalty[len(text)] for r, text in zip(world.rollouts([]), world.texts, strict=True)]
    assert same(chosen.step(), world.gradient(total))
    assert differ(chosen.step(), world.expected_step([FINAL]))
    rewards = chosen.batch().rewards
    for row, text in enumerate(world.texts):
        assert float(rewards[row, 1].sum()) == pytest.approx(penalty[len(text)])
        assert float(rewards[row, 1, 2 + len(text) - 1]) == pytest.approx(penalty[len(text)])
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
    found = credit.over_length(mask, LONGEST, 2)
    assert found.tolist() == [[0.0, 0.0, 0.0, 0.0, -0.5, 0.0], [0.0] * 6, [0.0, 0.0, 0.0, 0.0, 0.0, -1.0]]


def test_weights_follow_their_targets(world: World, reference: World) -> None:
    """The KL's weight grows with the relative error, bounded by a fifth; the entropy's the other way.

    w <- w (1 + clip(KL / target - 1, -0.2, 0.2) texts / horizon)      (Ziegler et al., 2019, section 2.2)
    """
    config = AlgorithmConfig(kl=0.5, kl_target=0.1, kl_horizon=62)
    batch = held(world, reference, kl_target=0.1, kl_horizon=62).batch()
    for kl, error in ((0.11, 0.1), (0.09, -0.1), (5.0, 0.2), (0.0, -0.2)):
        found = carried.adapt(batch, {"kl": kl}, config)
        assert found.kl == pytest.approx(0.5 * (1.0 + error * 31 / 62))
        again = carried.adapt(replace(batch, carried=found), {"kl": 5.0}, config)
        assert again.kl == pytest.approx(found.kl * 1.1)
    config = AlgorithmConfig(entropy=0.5, entropy_target=2.0)
    for entropy, factor in ((1.9, 1.025), (2.1, 0.975), (0.0, 1.1), (9.0, 0.9)):
        assert carried.adapt(batch, {"entropy": entropy}, config).entropy == pytest.approx(0.5 * factor)
    # What was carried is what counts in the credit and in the loss.
    moved = held(world, reference, kl_target=0.1, carried=Carried(step=1, kl=1.4))
    assert same(moved.step(), 2.0 * held(world, reference).step())
    loss = held(world, reference, kl_as="loss", kl_estimator="k2", kl_target=0.1, carried=Carried(step=1, kl=1.4))
    before = held(world, reference, kl_as="loss", kl_estimator="k2")
    assert same(loss.step(), 2.0 * before.step())


def test_weights_wait_while_the_critic_learns_alone(world: World, reference: World) -> None:
    """While the policy does not learn, its KL and entropy stay where they are, and their weights must not run away.

    w[n + 1] = w[n]  for the first ``critic.warmup`` steps; from then on it follows
    """
    values = [{prefix: chance(f"{source} {prefix}") for prefix in world.row_of} for source in range(2)]
    options: dict[str, Any] = {"kl": 0.5, "kl_target": 0.1, "kl_horizon": 62, "entropy": 0.3, "entropy_target": 3.0}
    far = {"kl": 0.0, "entropy": 1.0}  # both as far from their targets as a step reacts to
    for warmup in (0, 3):
        critic = {"warmup": warmup}
        chosen = Chosen(world, [FINAL], name="ppo", reference=reference, values=values, critic=critic, **options)
        batch, found, kl, entropy = chosen.batch(), Carried(), 0.5, 0.3
        for number in range(5):
            found = chosen.algorithm.adapt(replace(batch, carried=found), far)
            if number >= warmup:
                kl, entropy = kl * (1.0 - 0.2 * 31 / 62), entropy * 1.1
            assert carried.kl_weight(found, chosen.config) == pytest.approx(kl, abs=1e-12)
            assert carried.entropy_weight(found, chosen.config) == pytest.approx(entropy, abs=1e-12)
            assert found.step == number + 1, "the steps count all the same"
            assert found.mean_return == pytest.approx(float(batch.returns[batch.mask].mean()))
    plain = Chosen(world, [FINAL], name="reinforce", reference=reference, **options)
    moved = plain.algorithm.adapt(replace(plain.batch(), carried=Carried()), far)
    assert moved.kl == pytest.approx(0.45), "without a critic they follow at once"


def test_the_running_mean_of_returns(world: World) -> None:
    """The mean of earlier steps' returns, an exponential average with what is missing at first made up for.

    m_n = sum_i 0.9**(n - i) x_i / sum_i 0.9**(n - i)
    """
    batch, config = Chosen(world, [FINAL], name="reinforce").batch(), AlgorithmConfig(name="reinforce")
    found, seen = Carried(), []
    for number in range(5):
        returns = torch.where(batch.mask, float(number**2), 1e3).double()
        found = carried.adapt(replace(batch, carried=found, returns=returns), {}, config)
        seen.append(float(number**2))
        decay = [0.9 ** (len(seen) - 1 - i) for i in range(len(seen))]
        wanted = sum(d * x for d, x in zip(decay, seen, strict=True)) / sum(decay)
        assert found.mean_return == pytest.approx(wanted)
        assert found.step == number + 1
