"""GAE and V-trace: against a plain recursion, at the ends of lambda, and in expectation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.world import PROMPT, REINFORCE, World, angle_differs, chance, same
from instant_reward import credit
from instant_reward.batch import Batch

torch.set_num_threads(1)
FIRST = len(PROMPT.token_ids)


@dataclass
class Case:
    """Random rewards, values and ratios with a prompt, gaps and padding, float64."""

    rewards: Tensor
    values: Tensor
    log_ratio: Tensor
    mask: Tensor
    bootstrap: Tensor

    @classmethod
    def random(cls, seed: int, rows: int = 6, length: int = 9) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        mask = torch.rand(rows, length, generator=generator) < 0.7
        mask[:, 0] = False
        # Half of the texts finished, the others were cut off.
        bootstrap = numbers(rows) * (torch.arange(rows) % 2)
        return cls(numbers(rows, length), numbers(rows, length), 0.8 * numbers(rows, length), mask, bootstrap)

    def row(self, tensor: Tensor, row: int) -> list[float]:
        """The sampled tokens' entries."""
        return tensor[row][self.mask[row]].tolist()


def recursion(
    rewards: list[float], values: list[float], ratios: list[float], discount: float, lam: float, rho_max: float,
    c_max: float, bootstrap: float,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """V-trace as a sum over later errors, as in Espeholt et al. (2018), equation 1: no running target.

    v_s = V_s + sum_{t >= s} g**(t - s) (prod_{s <= i < t} c_i) rho_t (r_t + g V_{t+1} - V_t)
    """
    ahead = [*values[1:], bootstrap] if values else []
    rho, c = [min(rho_max, ratio) for ratio in ratios], [lam * min(c_max, ratio) for ratio in ratios]
    errors = [rho[t] * (rewards[t] + discount * ahead[t] - values[t]) for t in range(len(values))]
    targets = []
    for s in range(len(values)):
        later = [discount ** (t - s) * math.prod(c[s:t]) * errors[t] for t in range(s, len(values))]
        targets.append(values[s] + sum(later))
    after = [*targets[1:], bootstrap] if values else []
    advantages = [
        rho[t] * (rewards[t] + discount * (lam * after[t] + (1 - lam) * ahead[t]) - values[t])
        for t in range(len(values))
    ]
    return advantages, targets


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("discount", "lam", "rho_max", "c_max"),
    [(1.0, 1.0, 1.0, 1.0), (0.9, 0.95, 1.0, 1.0), (0.8, 0.5, 2.0, 1.5), (0.7, 0.0, 1.0, 1.0), (1.0, 0.9, 9e9, 9e9)],
)
def test_vtrace_against_the_sum(seed: int, discount: float, lam: float, rho_max: float, c_max: float) -> None:
    """V-trace equals its definition as a sum, row by row, over sampled tokens only; elsewhere it is 0."""
    case = Case.random(seed)
    advantages, targets = credit.vtrace(
        case.rewards, case.values, case.log_ratio, case.mask, discount, lam, rho_max, c_max, case.bootstrap
    )
    for row in range(len(case.rewards)):
        ratios = case.row(case.log_ratio.exp(), row)
        bootstrap = float(case.bootstrap[row])
        wanted = recursion(
            case.row(case.rewards, row), case.row(case.values, row), ratios, discount, lam, rho_max, c_max, bootstrap
        )
        assert case.row(advantages, row) == pytest.approx(wanted[0], abs=1e-10)
        assert case.row(targets, row) == pytest.approx(wanted[1], abs=1e-10)
    assert not advantages[~case.mask].any()
    assert not targets[~case.mask].any()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.9, 0.0)])
def test_gae_against_the_sum(seed: int, discount: float, lam: float) -> None:
    """GAE is the sum of later one-step errors, and its returns are advantage plus value.

    A_t = sum_{s >= t} (g lambda)**(s - t) (r_s + g V_{s+1} - V_s)
    """
    case = Case.random(seed)
    advantages, returns = credit.gae(case.rewards, case.values, case.mask, discount, lam, case.bootstrap)
    for row in range(len(case.rewards)):
        rewards, values = case.row(case.rewards, row), case.row(case.values, row)
        ahead = [*values[1:], float(case.bootstrap[row])]
        errors = [r + discount * n - v for r, n, v in zip(rewards, ahead, values, strict=False)]
        wanted = [
            sum((discount * lam) ** (s - t) * errors[s] for s in range(t, len(errors))) for t in range(len(errors))
        ]
        assert case.row(advantages, row) == pytest.approx(wanted, abs=1e-10)
    assert same(returns, torch.where(case.mask, advantages + case.values, 0.0))


def test_lambda_one_is_return_less_value_and_zero_the_one_step_error() -> None:
    """GAE with lambda 1 is return minus value; with lambda 0, the one-step error.

    lambda 1: A_t = G_t - V_t;  lambda 0: A_t = r_t + g V_{t+1} - V_t
    """
    case, discount = Case.random(1), 0.9
    finished = torch.zeros_like(case.bootstrap)
    advantages, returns = credit.gae(case.rewards, case.values, case.mask, discount, 1.0, finished)
    wanted = credit.reward_to_go(case.rewards, case.mask, discount)
    assert same(returns, wanted)
    assert same(advantages, torch.where(case.mask, wanted - case.values, 0.0))

    one_step, _ = credit.gae(case.rewards, case.values, case.mask, discount, 0.0, finished)
    for row in range(len(case.rewards)):
        rewards, values = case.row(case.rewards, row), case.row(case.values, row)
        errors = [r + discount * n - v for r, n, v in zip(rewards, [*values[1:], 0.0], values, strict=False)]
        assert case.row(one_step, row) == pytest.approx(errors, abs=1e-12)
    assert not same(one_step, advantages)


def test_cut_off_texts_bootstrap_and_finished_ones_do_not() -> None:
    """A cut-off text goes on with the value after its last token; a finished text with 0, as if none were given.

    lambda 1: G_t(cut off) = G_t(finished) + g**(tokens left) V_end
    """
    rewards = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    values, mask = torch.full_like(rewards, 0.5), torch.tensor([[0, 1, 1], [0, 1, 1]])
    bootstrap = torch.tensor([4.0, 0.0], dtype=torch.float64)
    _, returns = credit.gae(rewards, values, mask, 0.5, 1.0, bootstrap)
    assert returns.tolist() == [[0.0, 1.0 + 0.5 * (2.0 + 0.5 * 4.0), 2.0 + 0.5 * 4.0], [0.0, 2.0, 2.0]]
    _, without = credit.gae(rewards, values, mask, 0.5, 1.0)
    assert without[1].equal(returns[1])
    assert without[0].equal(without[1])


def test_padding_and_gaps_change_nothing() -> None:
    """Padding, a prompt and another speaker's turns are passed over, whatever stands there, NaN included."""
    case = Case.random(2)
    options = {"discount": 0.9, "lam": 0.8, "bootstrap": case.bootstrap}
    advantages, targets = credit.vtrace(case.rewards, case.values, case.log_ratio, case.mask, **options)
    spoiled = [torch.where(case.mask, x, torch.nan) for x in (case.rewards, case.values, case.log_ratio)]
    again = credit.vtrace(*spoiled, case.mask.int(), **options)
    assert same(advantages, again[0])
    assert same(targets, again[1])
    assert same(credit.reward_to_go(spoiled[0], case.mask, 0.9), credit.reward_to_go(case.rewards, case.mask, 0.9))
    assert same(credit.whole_return(spoiled[0], case.mask), credit.whole_return(case.rewards, case.mask))

    packed = [torch.zeros(6, 14, dtype=torch.float64) for _ in range(3)]
    mask = torch.zeros(6, 14, dtype=torch.bool)
    for row in range(6):
        count = int(case.mask[row].sum())
        mask[row, 2 : 2 + count] = True
        for target, source in zip(packed, (case.rewards, case.values, case.log_ratio), strict=True):
            target[row, 2 : 2 + count] = source[row][case.mask[row]]
    moved, _ = credit.vtrace(*packed, mask, **options)
    assert same(moved[mask], advantages[case.mask])

    unmasked, _ = credit.vtrace(case.rewards, case.values, case.log_ratio, torch.ones_like(case.mask), **options)
    assert not same(torch.where(case.mask, unmasked, 0.0), advantages), "the mask is ignored"


def test_vtrace_on_policy_is_the_n_step_return_and_gae() -> None:
    """V-trace on-policy is the n-step return; with c = lambda its targets are GAE + V, its advantages GAE's.

    ratio 1, lambda 1: v_t = sum_{s >= t} g**(s - t) r_s + g**(tokens left) V_end
    """
    case, on_policy = Case.random(3), torch.zeros(6, 9, dtype=torch.float64)
    bare = (case.rewards, case.values, on_policy, case.mask)
    _, targets = credit.vtrace(*bare, 0.9, bootstrap=case.bootstrap)
    for row in range(6):
        rewards = [*case.row(case.rewards, row), float(case.bootstrap[row])]
        count = len(rewards) - 1
        wanted = [sum(0.9 ** (s - t) * rewards[s] for s in range(t, count + 1)) for t in range(count)]
        assert case.row(targets, row) == pytest.approx(wanted, abs=1e-10)

    for lam in (0.0, 0.3, 1.0):
        advantages, targets = credit.vtrace(*bare, 0.9, lam, bootstrap=case.bootstrap)
        gae, returns = credit.gae(case.rewards, case.values, case.mask, 0.9, lam, case.bootstrap)
        assert same(advantages, gae)
        assert same(targets, torch.where(case.mask, gae + case.values, 0.0))
        assert same(targets, returns)
    assert not same(credit.vtrace(*bare, 0.9, 0.3)[1], credit.vtrace(*bare, 0.9, 1.0)[1])


def test_weights_carry_no_gradient() -> None:
    """The ratio is a weight: nothing flows through it."""
    case = Case.random(4)
    log_ratio = case.log_ratio.requires_grad_()
    advantages, targets = credit.vtrace(case.rewards, case.values, log_ratio, case.mask)
    assert not advantages.requires_grad
    assert not targets.requires_grad


def value_of(world: World, prefix: list[int]) -> float:
    """The expected score of the texts that begin so: the true value, by enumeration."""
    weights = world.probabilities().detach()
    total = mass = 0.0
    for text, weight, rollout in zip(world.texts, weights.tolist(), world.rollouts([]), strict=True):
        if text[: len(prefix)] == prefix:
            total, mass = total + weight * chance(rollout.text), mass + weight
    return total / mass


def test_gae_in_expectation() -> None:
    """With any values lambda 1 has the exact gradient; with the true values every lambda has; else it is biased.

    E[ sum_t grad log p(x_t) A_t ] = grad sum_x p(x) R(x)
    """
    world = World()
    final = ir.reward(every="end", name="final")(lambda view: chance(view.text))
    true = {prefix: value_of(world, list(prefix)) for prefix in world.row_of}

    def actor_critic(batch: Batch, values_of: dict[tuple[int, ...], float], lam: float) -> Batch:
        batch = REINFORCE(batch)
        values = torch.zeros_like(batch.returns)
        for row, t in batch.mask.nonzero().tolist():
            values[row, t] = values_of[tuple(batch.token_ids[row, FIRST:t].tolist())]
        advantages, _ = credit.gae(batch.rewards[:, 0], values, batch.mask, 1.0, lam)
        return replace(batch, advantages=advantages)

    wrong = {prefix: value + chance(str(prefix)) for prefix, value in true.items()}
    exact = world.gradient([chance(rollout.text) for rollout in world.rollouts([])])
    for lam in (0.0, 0.5, 1.0):
        assert same(world.expected_step([final], lambda batch, lam=lam: actor_critic(batch, true, lam)), exact)
        step = world.expected_step([final], lambda batch, lam=lam: actor_critic(batch, wrong, lam))
        assert same(step, exact) if lam == 1.0 else angle_differs(step, exact)
