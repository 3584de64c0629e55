"""Item 8: texts that another policy wrote: which weights make up for it exactly, which in part, what has gradient.

``q`` wrote the texts, ``p`` learns: the expectation is over ``q``, the gradient that of ``p``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.chosen import Chosen, true_values
from exact.world import World, angle_differs, chance, differ, same
from instant_reward import importance, losses
from instant_reward.batch import Batch
from instant_reward.types import Carried, LossOutput

torch.set_num_threads(1)
FINAL = ir.reward(every="end", name="final")(lambda view: chance(view.text))
WORDS = ir.reward(every="word", name="words", discount=0.6)(lambda view: chance(f"{view.text} word"))
BOTH = [FINAL, WORDS]
SEQUENCE = {"level": "sequence", "most": None}
DECISION = {"level": "decision", "most": None}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def sampler() -> World:
    return World(seed=1)


@pytest.fixture(scope="module")
def plain(world: World) -> Tensor:
    """The step on the policy's own texts."""
    return world.expected_step(BOTH)


def of(world: World, sampler: World, weights: Any, rewards: Any = BOTH, **options: Any) -> Chosen:
    return Chosen(world, rewards, sampler=sampler, importance=weights, **{"name": "reinforce", **options})


def test_uncorrected_is_biased(world: World, sampler: World, plain: Tensor) -> None:
    """Another policy's texts, taken for one's own, have another gradient.

    E_q[ sum_t grad log p(x_t) G[t] ] != E_p[ sum_t grad log p(x_t) G[t] ]
    """
    assert same(Chosen(world, BOTH, name="reinforce").step(), plain)
    assert angle_differs(of(world, sampler, None).step(), plain)


def test_the_whole_texts_ratio_is_exact(world: World, sampler: World, plain: Tensor) -> None:
    """Weighed by the ratio of the whole text, they have the gradient of one's own.

    E_q[ prod_s p(x_s) / q(x_s) sum_t grad log p(x_t) G[t] ] = E_p[ sum_t grad log p(x_t) G[t] ]
    """
    assert same(of(world, sampler, SEQUENCE).step(), plain)
    exact = world.gradient([chance(rollout.text) for rollout in world.rollouts([])])
    assert same(of(world, sampler, SEQUENCE, [FINAL]).step(), exact)


def test_each_reward_by_the_ratio_so_far_is_exact(world: World, sampler: World, plain: Tensor) -> None:
    """Per decision: each reward weighed by the ratio up to the token that pays it; later tokens do not matter.

    E_q[ sum_t grad log p(x_t) sum_{s >= t} g**(s - t) (prod_{u <= s} p / q) r_s ] = E_p[ sum_t grad log p(x_t) G[t] ]
    """
    assert same(of(world, sampler, DECISION).step(), plain)

    def early(batch: Batch) -> Batch:
        """Wrong on purpose: the ratio up to the token before the one that pays."""
        chosen = of(world, sampler, None)
        so_far = importance.cumulative(chosen.known(world, batch) - batch.old_logprobs, batch.mask)
        so_far = torch.where(batch.mask, so_far, 1.0).roll(1, dims=1)
        batch = chosen.credit(batch)
        paid = batch.rewards * so_far[:, None]
        found = torch.zeros_like(batch.advantages)
        for index, source in enumerate(batch.sources):
            found = found + ir.credit.reward_to_go(paid[:, index], batch.mask, source.discount)
        return replace(batch, advantages=found)

    assert angle_differs(of(world, sampler, None).step(credit=early), plain)


@pytest.mark.parametrize("weights", [SEQUENCE, DECISION], ids=["sequence", "decision"])
def test_baselines_stay_unbiased(world: World, sampler: World, plain: Tensor, weights: Any) -> None:
    """A baseline of the prefix, of earlier steps or of the siblings is weighed along, and changes nothing.

    E_q[ (prod_{u <= t} p / q) grad log p(x_t) b(x_<t) ] = E_p[ grad log p(x_t) b(x_<t) ] = 0
    """
    values = [{prefix: 2.0 * chance(f"{number} {prefix}") for prefix in world.row_of} for number in range(2)]
    judged = of(world, sampler, weights, baseline="value", values=values)
    assert same(judged.step(), plain)
    carried = Carried(step=3, mean_return=0.7, mean_weight=0.3)
    assert same(of(world, sampler, weights, baseline="running_mean", carried=carried).step(), plain)
    assert same(of(world, sampler, weights, name="rloo").step(siblings=2), plain)
    if weights is DECISION:

        def unweighed(batch: Batch) -> Batch:
            """Wrong on purpose: the baseline is not weighed by the ratio that its term would have had."""
            bare = of(world, sampler, weights)
            level = judged.annotate(batch).values.sum(1)
            credited = bare.credit(batch)
            return replace(credited, advantages=credited.advantages - level)

        assert angle_differs(of(world, sampler, weights).step(credit=unweighed), plain)


@pytest.mark.parametrize("level", ["token", "piece"])
def test_a_tokens_or_a_pieces_own_ratio_is_biased(world: World, sampler: World, plain: Tensor, level: str) -> None:
    """A ratio of the token or of its piece alone is not exact: the prefix and the rest are still the sampler's.

    E_q[ sum_t p(x_t) / q(x_t) grad log p(x_t) G[t] ] != E_p[ sum_t grad log p(x_t) G[t] ]
    """
    pieces = {"pieces": "word"} if level == "piece" else {}
    chosen = of(world, sampler, {"level": level, "most": None}, [FINAL], **pieces)
    exact = world.gradient([chance(rollout.text) for rollout in world.rollouts([])])
    assert angle_differs(chosen.step(), exact)
    assert same(of(world, sampler, SEQUENCE, [FINAL], **pieces).step(), exact)
    assert same(of(world, sampler, DECISION, [FINAL], **pieces).step(), exact)
    on_policy = of(world, world, {"level": level, "most": None}, [FINAL], **pieces)
    assert same(on_policy.step(), exact), "on its own texts all ratios are 1"


def test_pieces_by_the_ratio_so_far_are_exact(world: World, sampler: World) -> None:
    """Where words are the actions, a word's reward is weighed by the ratio up to the word's last token: exact.

    E_q[ sum_i grad log p(word_i) sum_{j >= i} (prod_{u in words <= j} p / q) r_j ]
    """
    words = WORDS.but(discount=1.0)
    plain = Chosen(world, [words], name="reinforce", pieces="word").step()
    assert same(plain, world.expected_step([words]))
    for name, siblings in (("reinforce", 1), ("rloo", 2)):
        assert same(of(world, sampler, DECISION, [words], name=name, pieces="word").step(siblings), plain)
    discounted = Chosen(world, [WORDS], name="reinforce", pieces="word").step()
    assert same(of(world, sampler, DECISION, [WORDS], pieces="word").step(), discounted)
    assert differ(discounted, world.expected_step([WORDS])), "a discount by words is another one than by tokens"


@pytest.mark.parametrize("level", ["sequence", "decision"])
def test_truncating_and_dropping_bias(world: World, sampler: World, plain: Tensor, level: str) -> None:
    """Bounded weights are no longer exact: less noise for a bias. A bound that none reaches changes nothing."""
    assert angle_differs(of(world, sampler, {"level": level, "most": 1.5}).step(), plain)
    assert same(of(world, sampler, {"level": level, "most": 1e9}).step(), plain)
    if level == "sequence":
        assert angle_differs(of(world, sampler, {"level": level, "most": 1.5, "beyond": "mask"}).step(), plain)


def test_weights_against_plain_products(world: World, sampler: World) -> None:
    """Each level's weights, token by token: the product of ratios over the segment, bounded as it is told.

    token p/q;  piece: over its tokens;  sequence: over the text;  so far: over the tokens up to this one
    """
    batch = of(world, sampler, SEQUENCE, pieces="word").batch()
    log_ratio = torch.where(batch.mask, batch.proximal_logprobs - batch.old_logprobs, torch.nan).requires_grad_()
    for level in ("token", "piece", "sequence", "decision"):
        found = (
            importance.cumulative(log_ratio, batch.mask)
            if level == "decision"
            else importance.weights(log_ratio, batch.mask, level, batch.pieces)
        )
        assert not found.requires_grad, "a weight is a number"
        for row, t in batch.mask.nonzero().tolist():
            places = batch.mask[row].nonzero().flatten().tolist()
            within = {
                "token": [t],
                "piece": [s for s in places if batch.pieces[row, s] == batch.pieces[row, t]],
                "sequence": places,
                "decision": [s for s in places if s <= t],
            }[level]
            wanted = float(log_ratio.detach()[row, within].sum().exp())
            assert float(found[row, t]) == pytest.approx(wanted, abs=1e-12)
            if level != "decision":
                cut = importance.weights(log_ratio, batch.mask, level, batch.pieces, 1.3)
                assert float(cut[row, t]) == pytest.approx(min(wanted, 1.3), abs=1e-12)
                dropped = importance.weights(log_ratio, batch.mask, level, batch.pieces, 1.3, "mask")
                kept = wanted if 1 / 1.3 <= wanted <= 1.3 else 0.0
                assert float(dropped[row, t]) == pytest.approx(kept, abs=1e-12)
        assert not found[~batch.mask].any()


def test_the_effective_sample_size(world: World, sampler: World) -> None:
    """1 for the policy's own texts, one text's share where it outweighs all others.

    (sum w)**2 / (B sum w**2)
    """
    batch = of(world, sampler, SEQUENCE).batch()
    gap = torch.where(batch.mask, batch.proximal_logprobs - batch.old_logprobs, torch.nan)
    ratios = [float(gap[row][batch.mask[row]].sum().exp()) for row in range(len(batch))]
    wanted = sum(ratios) ** 2 / (len(ratios) * sum(ratio**2 for ratio in ratios))
    assert importance.effective_sample_size(gap, batch.mask) == pytest.approx(wanted, abs=1e-12)
    assert importance.effective_sample_size(torch.zeros_like(gap), batch.mask) == pytest.approx(1.0)
    one = torch.zeros_like(gap)
    one[4] = 500.0  # as a ratio it would be no number any more
    assert importance.effective_sample_size(one, batch.mask) == pytest.approx(1.0 / len(batch))
    assert wanted < 0.9


def test_a_weight_carries_no_gradient_and_the_surrogates_ratio_does(world: World, sampler: World) -> None:
    """An importance weight is a number; in the clipped loss the ratio itself is what is differentiated.

    weight:  grad = w A grad log p      surrogate:  grad (p / q) A = (p / q) A grad log p
    """
    token = of(world, sampler, {"level": "token", "most": None})
    weighed = token.step()
    surrogate = Chosen(world, BOTH, sampler=sampler, name="reinforce", loss="clipped", clip_low=0.999999, clip_high=1e9)
    assert same(surrogate.step(), weighed)

    def leaky(logprobs: Tensor, part: Batch) -> LossOutput:
        """Wrong on purpose: gradient through the weight."""
        ratio = torch.where(part.mask, logprobs - part.old_logprobs, 0.0).exp()
        return LossOutput(-torch.where(part.mask, ratio * part.advantages * logprobs, 0.0).sum())

    assert angle_differs(of(world, sampler, None).step(loss=leaky), weighed)

    def frozen(logprobs: Tensor, part: Batch) -> LossOutput:
        """Wrong on purpose: a surrogate whose ratio is a number has no gradient at all."""
        ratio = torch.where(part.mask, logprobs - part.old_logprobs, 0.0).exp().detach()
        return LossOutput(torch.where(part.mask, -ratio * part.advantages + 0.0 * logprobs, 0.0).sum())

    assert same(of(world, sampler, None).step(loss=frozen), torch.zeros_like(weighed))

    def tracked(logprobs: Tensor, part: Batch) -> LossOutput:
        """The library's loss takes the weights as numbers even where they come with gradient."""
        ratio = torch.where(part.mask, logprobs - part.old_logprobs, 0.0).exp()
        return losses.policy_gradient(logprobs, replace(part, weights=ratio))

    assert same(of(world, sampler, None).step(loss=tracked), weighed)


def test_the_whole_texts_surrogate(world: World, sampler: World) -> None:
    """GSPO's ratio: the geometric mean over the text in value, each token's own gradient. It is not exact off-policy.

    grad = s A grad log p(x_t),  s = exp( mean over t of log p / q )
    """
    options = {"ratio": "sequence", "clip_low": 0.999999, "clip_high": 1e9}
    chosen = Chosen(world, [FINAL], sampler=sampler, name="reinforce", loss="clipped", **options)

    def by_hand(logprobs: Tensor, part: Batch) -> LossOutput:
        gap = (logprobs - part.old_logprobs)[part.mask].mean().exp().detach()
        return LossOutput(-(gap * part.advantages * logprobs)[part.mask].sum())

    assert same(chosen.step(), chosen.step(loss=by_hand))
    assert angle_differs(chosen.step(), world.gradient([chance(r.text) for r in world.rollouts([])]))


def test_the_whole_texts_ratio_of_fresh_texts_is_free_of_the_samplers_rounding(world: World) -> None:
    """GSPO's bounds are narrower than bfloat16 rounds: of its own texts the ratio is to the policy as the step began.

    s = 1 for every text, whatever the sampler's rounded log q says
    """
    chosen = Chosen(world, [FINAL], name="reinforce", loss="clipped", ratio="sequence", clip_low=3e-4, clip_high=4e-4)

    def rounded(batch: Batch) -> Batch:
        return chosen.credit(replace(batch, old_logprobs=batch.old_logprobs * 1.02))

    assert same(chosen.step(credit=rounded), Chosen(world, [FINAL], name="reinforce").step())

    def as_the_sampler_said(batch: Batch) -> Batch:
        return replace(rounded(batch), fresh=torch.zeros(len(batch), dtype=torch.bool))

    assert differ(chosen.step(credit=as_the_sampler_said), chosen.step(credit=rounded))


def test_vtrace_through_the_preset(world: World, sampler: World) -> None:
    """On its own texts V-trace is unbiased as GAE is; on another policy's its bounded ratios make up for a part.

    own texts:  A = G - V, whatever V is, at lambda 1;  at lambda 0 with the true V alone
    """
    true = true_values(world, [FINAL])[0]
    exact = world.gradient([chance(rollout.text) for rollout in world.rollouts([])])
    wrong = {prefix: value + chance(str(prefix)) for prefix, value in true.items()}
    assert same(Chosen(world, [FINAL], name="vtrace", lam=1.0, values=[wrong]).step(), exact)
    assert same(Chosen(world, [FINAL], name="vtrace", lam=0.0, values=[true]).step(), exact)
    assert angle_differs(Chosen(world, [FINAL], name="vtrace", lam=0.0, values=[wrong]).step(), exact)
    off = Chosen(world, [FINAL], sampler=sampler, name="vtrace", lam=0.0, values=[true])
    uncorrected = Chosen(world, [FINAL], sampler=sampler, name="a2c", lam=0.0, values=[true]).step()
    assert angle_differs(off.step(), exact)
    assert differ(off.step(), uncorrected)
