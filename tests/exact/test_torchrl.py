"""GAE, lambda-returns and V-trace equal those of TorchRL, on random texts with prompts, gaps, ends and cuts.

TorchRL has dense trajectories: one step after another, the next state's value given for each, and flags for the last
step (done) and for one that finished (terminated). Here a text's sampled tokens are such a trajectory, whatever stands
between them; a text that was cut off is done, but not terminated.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from instant_reward import credit

torch.set_num_threads(1)
SHAPES = [(1, 1), (1, 7), (6, 12), (9, 5), (4, 33)]
CLIPS = [(1.0, 1.0), (2.0, 1.5), (0.7, 1.2), (1e9, 1e9)]  # the last one clips nothing
GAMMAS = [(1.0, 1.0), (1.0, 0.95), (0.9, 1.0), (0.97, 0.5), (0.5, 0.9), (0.9, 0.0), (0.0, 0.9)]


@pytest.fixture(scope="module")
def torchrl() -> ModuleType:
    """The pure functions of TorchRL; importing it takes seconds."""
    reason = "TorchRL is not installed; it comes with the extra 'test'"
    return pytest.importorskip("torchrl.objectives.value.functional", reason=reason)


@dataclass
class Steps:
    """One trajectory as TorchRL has it, ``[1, T, 1]`` each; ``T`` sampled tokens."""

    rewards: Tensor
    values: Tensor
    next_values: Tensor
    log_ratio: Tensor
    done: Tensor
    terminated: Tensor


@dataclass
class Texts:
    """Random texts as this library has them: ``[B, L]``, some finished, the others cut off."""

    rewards: Tensor
    values: Tensor
    log_ratio: Tensor
    mask: Tensor
    finished: Tensor
    bootstrap: Tensor

    @classmethod
    def random(cls, rows: int, length: int, seed: int, gaps: bool) -> Texts:
        """With ``gaps``, prompts and what others wrote lie between the sampled tokens, and padding behind them."""
        generator = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        mask = torch.ones(rows, length, dtype=torch.bool)
        if gaps:
            mask = torch.rand(rows, length, generator=generator) < 0.6
            mask[torch.arange(rows), torch.randint(length, (rows,), generator=generator)] = True
        finished = torch.rand(rows, generator=generator) < 0.5
        bootstrap = torch.where(finished, 0.0, numbers(rows))
        return cls(numbers(rows, length), numbers(rows, length), numbers(rows, length), mask, finished, bootstrap)

    def steps(self, row: int) -> Steps:
        """The sampled tokens of one text in a row. The state after a finished text has a value that must not count."""
        on = self.mask[row]
        rewards, values, log_ratio = (x[row, on].view(1, -1, 1) for x in (self.rewards, self.values, self.log_ratio))
        after = torch.where(self.finished[row], 77.0, self.bootstrap[row]).view(1, 1, 1)
        done = torch.zeros_like(rewards, dtype=torch.bool)
        done[:, -1] = True
        return Steps(rewards, values, torch.cat([values[:, 1:], after], 1), log_ratio, done, done & self.finished[row])


def exactly(number: float) -> Tensor:
    """A number as TorchRL must be given it: it would round a plain one to float32."""
    return torch.tensor(number, dtype=torch.float64)


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal to ten digits, large numbers to ten digits of themselves."""
    return torch.allclose(ours, theirs.flatten(), rtol=1e-10, atol=1e-10)


def cases() -> list[Texts]:
    return [
        Texts.random(*shape, seed=number, gaps=gaps) for number, shape in enumerate(SHAPES) for gaps in (False, True)
    ]


@pytest.mark.parametrize(("discount", "lam"), GAMMAS)
def test_advantages_are_torchrls(torchrl: ModuleType, discount: float, lam: float) -> None:
    """Advantages and returns of GAE are TorchRL's, for texts that finished and for those cut off.

    A_t = delta_t + g lambda A_{t+1},  R_t = A_t + V_t
    """
    for texts in cases():
        ours = credit.gae(texts.rewards, texts.values, texts.mask, discount, lam, texts.bootstrap)
        for row in range(len(texts.mask)):
            one, on = texts.steps(row), texts.mask[row]
            given = (exactly(discount), lam, one.values, one.next_values, one.rewards, one.done, one.terminated)
            functions = [torchrl.generalized_advantage_estimate]
            # The vectorised one drops weights (g lambda)**k below 1e-7, and fails where g lambda is 0.
            if (discount * lam) ** int(on.sum()) > 1e-7:
                functions.append(torchrl.vec_generalized_advantage_estimate)
            for function in functions:
                for mine, theirs in zip(ours, function(*given), strict=True):
                    assert close(mine[row, on], theirs), function.__name__


@pytest.mark.parametrize(("discount", "lam"), GAMMAS)
def test_returns_are_torchrls_lambda_returns(torchrl: ModuleType, discount: float, lam: float) -> None:
    """What GAE calls returns are TorchRL's lambda-returns: no value of its own state is in them but through lambda.

    R_t = r_t + g ((1 - lambda) V_{t+1} + lambda R_{t+1})
    """
    for texts in cases():
        _, returns = credit.gae(texts.rewards, texts.values, texts.mask, discount, lam, texts.bootstrap)
        for row in range(len(texts.mask)):
            one, on = texts.steps(row), texts.mask[row]
            theirs = torchrl.td_lambda_return_estimate(
                exactly(discount), lam, one.next_values, one.rewards, one.done, one.terminated
            )
            assert close(returns[row, on], theirs)


@pytest.mark.parametrize(("rho_max", "c_max"), CLIPS)
@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_vtrace_is_torchrls(torchrl: ModuleType, discount: float, rho_max: float, c_max: float) -> None:
    """With lambda 1, V-trace's advantages and targets are TorchRL's, which has no lambda.

    v_t = V_t + delta_t + g c_t (v_{t+1} - V_{t+1}),  A_t = rho_t (r_t + g v_{t+1} - V_t)
    """
    for texts in cases():
        ours = credit.vtrace(
            texts.rewards, texts.values, texts.log_ratio, texts.mask, discount, 1.0, rho_max, c_max, texts.bootstrap
        )
        for row in range(len(texts.mask)):
            one, on = texts.steps(row), texts.mask[row]
            theirs = torchrl.vtrace_advantage_estimate(
                exactly(discount),
                one.log_ratio,
                torch.zeros_like(one.log_ratio),
                one.values,
                one.next_values,
                one.rewards,
                one.done,
                one.terminated,
                exactly(rho_max),
                exactly(c_max),
            )
            for mine, their in zip(ours, theirs, strict=True):
                assert close(mine[row, on], their)


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.7])  # below, TorchRL drops weights g**k under 1e-7
def test_reward_to_go_is_torchrls(torchrl: ModuleType, discount: float) -> None:
    """The reward-to-go is TorchRL's.

    G_t = r_t + g G_{t+1}
    """
    for texts in cases():
        returns = credit.reward_to_go(texts.rewards, texts.mask, discount)
        for row in range(len(texts.mask)):
            one, on = texts.steps(row), texts.mask[row]
            assert close(returns[row, on], torchrl.reward2go(one.rewards, one.done, discount))


def test_a_difference_is_noticed(torchrl: ModuleType) -> None:
    """The comparison can fail: a wrong lambda, a forgotten bootstrap, a value after the end, tokens of others."""
    texts = Texts.random(8, 12, seed=3, gaps=True)
    assert texts.finished.any()
    assert not texts.finished.all()

    def agree(lam: float, mask: Tensor, bootstrap: Tensor) -> bool:
        ours, _ = credit.gae(texts.rewards, texts.values, mask, 0.9, lam, bootstrap)
        found = []
        for row in range(len(mask)):
            one = texts.steps(row)
            theirs, _ = torchrl.generalized_advantage_estimate(
                exactly(0.9), 0.8, one.values, one.next_values, one.rewards, one.done, one.terminated
            )
            found.append(close(ours[row, texts.mask[row]], theirs))
        return all(found)

    assert agree(0.8, texts.mask, texts.bootstrap)
    assert not agree(0.81, texts.mask, texts.bootstrap)
    assert not agree(0.8, texts.mask, torch.zeros_like(texts.bootstrap))
    assert not agree(0.8, texts.mask, torch.where(texts.finished, 77.0, texts.bootstrap))
    assert not agree(0.8, torch.ones_like(texts.mask), texts.bootstrap)
