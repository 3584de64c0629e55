"""Sums over the vocabulary: the policy gradient over next tokens, and the whole-vocabulary terms against autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.chosen import Chosen, prefixes, true_values
from exact.world import World, angle_differs, chance, same
from instant_reward import losses
from instant_reward.batch import Batch
from instant_reward.policies import head as heads
from instant_reward.policies import terms
from instant_reward.policies.head import Softmax
from instant_reward.policies.states import on_tokens
from instant_reward.policies.terms import Head
from instant_reward.types import LossOutput

torch.set_num_threads(1)
FINAL = ir.reward(every="end", name="final")(lambda view: chance(view.text))
WORDS = ir.reward(every="word", name="words", discount=0.6)(lambda view: chance(f"{view.text} word"))
ENDS = (1, 4)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_summed_over_next_tokens_the_true_q_is_exact(world: World) -> None:
    """With the true Q, the sum over next tokens is the policy gradient at each prefix, whatever token was drawn.

    grad E[ R ] = E[ sum_t sum_a grad p(a | x_<t) Q(x_<t, a) ],  Q = E[ G_t | x_<t, x_t = a ]
    """
    for rewards in ([FINAL], [WORDS]):
        table = true_values(world, rewards)[1]
        exact = world.expected_step(rewards)
        assert same(Chosen(world, rewards, name="qac", table=table).step(), exact)
        wrong = table + torch.tensor([0.2, 0.0, -0.3], dtype=torch.float64)
        assert angle_differs(Chosen(world, rewards, name="qac", table=wrong).step(), exact)


def test_q_less_v_leaves_the_gradient(world: World) -> None:
    """A value of the prefix taken away from Q leaves the sum's gradient, since the probabilities sum to 1.

    sum_a grad p(a) (Q(a) - V) = sum_a grad p(a) Q(a);  in value the sum is 0
    """
    table = true_values(world, [FINAL])[1]
    exact = world.expected_step([FINAL])
    level = torch.tensor([3.0 * chance(str(prefix)) for prefix in world.row_of], dtype=torch.float64)[:, None]
    assert same(Chosen(world, [FINAL], name="qac", table=table + level).step(), exact)

    chosen = Chosen(world, [FINAL], name="qac", table=table)
    batch = chosen.batch()
    assert same(chosen.output(world.logprobs(), batch).expected, torch.zeros(batch.mask.shape).double())

    def bare(logprobs: Tensor, part: Batch) -> LossOutput:
        """The sum of Q itself, without anything taken away: the same gradient, by plain autograd."""
        rows = prefixes(world, part)
        chances = world.logits.log_softmax(-1).exp()[rows]
        return losses.all_actions(on_tokens((chances * table[rows]).sum(-1), part.mask), part)

    assert same(chosen.step(loss=bare), exact)

    def off_by_one(logprobs: Tensor, part: Batch) -> LossOutput:
        """Wrong on purpose: the Q of the text behind the token, where there is one."""
        rows = prefixes(world, part)
        chances = world.logits.log_softmax(-1).exp()[rows]
        return losses.all_actions(on_tokens((chances * table[rows.roll(-1)]).sum(-1), part.mask), part)

    assert angle_differs(chosen.step(loss=off_by_one), exact)


def test_over_a_few_tokens_it_is_not(world: World) -> None:
    """Over the likeliest tokens alone the sum is another gradient; over as many as there are, it is the same."""
    table = true_values(world, [FINAL])[1]
    exact = world.expected_step([FINAL])
    assert angle_differs(Chosen(world, [FINAL], name="qac", top_actions=2, table=table).step(), exact)
    for enough in (3, 50):
        assert same(Chosen(world, [FINAL], name="qac", top_actions=enough, table=table).step(), exact)


def test_the_targets_of_q(world: World) -> None:
    """Q is fitted to the lambda-returns of the tokens that were drawn, over V = sum_a p(a) Q(a) of the prefix.

    targets = GAE(lambda) + V;  loss = 1/2 (Q(x_<t, x_t) - target)**2 per token
    """
    table = true_values(world, [FINAL])[1] + 0.1
    chosen = Chosen(world, [FINAL, WORDS.but(weight=2.0, discount=1.0)], name="qac", table=table, critic={"lam": 0.7})
    batch = chosen.batch()
    values = torch.where(batch.mask, batch.values[:, 0], 0.0)
    chances = world.logits.detach().softmax(-1)
    rows = prefixes(world, batch)
    assert same(values, on_tokens((chances * table).sum(1)[rows], batch.mask))
    total = batch.rewards[:, 0] + 2.0 * batch.rewards[:, 1]
    beyond = torch.zeros(len(batch), dtype=torch.float64)
    wanted = ir.credit.gae(total, values, batch.mask, 1.0, 0.7, beyond)[1]
    assert same(batch.targets[:, 0], wanted)
    asked = table[rows, batch.token_ids[batch.mask]]
    error = 0.5 * ((asked - wanted[batch.mask]) ** 2).mean()
    output = chosen.output(world.logprobs(), batch)
    assert same(losses.chosen_value(output.chosen, batch).loss, error)


def random_head(seed: int, rows: int = 7, width: int = 5, temperature: float = 0.7) -> Head:
    """A head with a bias, whose end tokens are forbidden in some rows."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    no_end = torch.rand(rows, generator=generator) < 0.5
    return Head(numbers(rows, 4), numbers(width, 4), numbers(width), no_end, Softmax(temperature, ENDS))


def full(head: Head) -> Tensor:
    """All log-probabilities by plain autograd, ``[N, V]``, a forbidden token's so low that it has no chance."""
    logits = (head.hidden @ head.weight.T + head.bias) / head.softmax.temperature
    forbidden = torch.zeros_like(logits, dtype=torch.bool)
    forbidden[:, list(ENDS)] = head.no_end[:, None]
    return logits.masked_fill(forbidden, -1e6).log_softmax(-1)


def by_hand(name: str, head: Head, teacher: Head, table: Tensor) -> Tensor:
    ours = full(head)
    if name == "entropy":
        return -(ours.exp() * ours).sum(-1)
    if name == "divergence":
        return (ours.exp() * (ours - full(teacher).detach())).sum(-1)
    if name == "few":
        kept = ours.topk(2, -1).indices
        chances, worth = ours.gather(1, kept).exp(), table.gather(1, kept)
    else:
        chances, worth = ours.exp(), table
    level = ((chances * worth).sum(-1, keepdim=True) / chances.sum(-1, keepdim=True)).detach()
    return (chances * (worth - level)).sum(-1)


TERMS: dict[str, Callable[[Head, Head, Tensor], Tensor]] = {
    "entropy": lambda head, teacher, table: terms.entropy(head),
    "divergence": lambda head, teacher, table: terms.divergence(head, teacher),
    "all": lambda head, teacher, table: terms.expected_advantage(head, lambda rows: table[rows]),
    "few": lambda head, teacher, table: terms.expected_advantage(head, lambda rows: table[rows], 2),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_whole_vocabulary_terms_against_autograd(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in chunks and once more for the backward pass, each term has plain autograd's value and gradient.

    H = -sum_a p log p;  KL = sum_a p log(p / T);  sum_a p(a) (Q(a) - V);  a forbidden end token counts 0: never NaN
    """
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 5 * chunk)
    head = random_head(0)
    teacher = replace(random_head(1), no_end=head.no_end)
    assert head.no_end.any()
    assert not head.no_end.all()
    table = torch.randn(7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    parameters = [head.hidden, head.weight, head.bias]
    found, wanted = TERMS[name](head, teacher, table), by_hand(name, head, teacher, table)
    assert same(found, wanted)
    for one, other in zip(
        torch.autograd.grad((weights * found).sum(), parameters),
        torch.autograd.grad((weights * wanted).sum(), parameters),
        strict=True,
    ):
        assert torch.isfinite(one).all()
        assert same(one, other)
    nothing = torch.zeros_like(head.no_end)
    # Wrong on purpose: the end was not forbidden, or the temperature left out.
    for other in (replace(head, no_end=nothing), replace(head, softmax=Softmax(1.0, ENDS))):
        term = TERMS[name](other, replace(teacher, no_end=nothing), table)
        (one,) = torch.autograd.grad((weights * term).sum(), head.weight)
        assert not same(one, torch.autograd.grad((weights * by_hand(name, head, teacher, table)).sum(), head.weight)[0])


def test_values_and_spreads_against_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of Q under the policy, and Q's log-sum-exp over the vocabulary with gradient into Q."""
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 10)
    head = random_head(0)
    table = torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        assert same(terms.expected_value(head, lambda rows: table[rows]), (full(head).exp() * table).sum(-1))
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    found, wanted = terms.log_sum_exp(lambda rows: table[rows], 7, 5), table.logsumexp(-1)
    assert same(found, wanted)
    (one,) = torch.autograd.grad((weights * found).sum(), table)
    (other,) = torch.autograd.grad((weights * wanted).sum(), table)
    assert same(one, other)


def test_no_tokens_at_all() -> None:
    """A part without sampled tokens has empty terms, and none of them fails."""
    head = random_head(0, rows=0)
    for name, term in TERMS.items():
        assert term(head, head, torch.zeros(0, 5).double()).shape == (0,), name
    assert terms.expected_value(head, lambda rows: torch.zeros(0, 5).double()).shape == (0,)
    assert terms.log_sum_exp(lambda rows: torch.zeros(0, 5).double(), 0, 5).shape == (0,)
