"""Words or lines as the actions, each credited as one; and ``instant``, which credits each piece with its own alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.chosen import FIRST, Chosen, true_values
from exact.world import ALPHABETS, END, World, angle_differs, chance, differ, same
from instant_reward import credit, losses
from instant_reward.batch import Batch
from instant_reward.text import Pieces
from instant_reward.types import LossOutput, Rollout

torch.set_num_threads(1)
FINAL = ir.reward(every="end", name="final")(lambda view: chance(view.text))
WORDS = ir.reward(every="word", name="words")(lambda view: chance(f"{view.text} word"))
TOKENS = ir.reward(every="token", name="tokens")(lambda view: chance(f"{view.text} {view.done}"))
ALL = [FINAL, WORDS, TOKENS]
CUTS = [(ALPHABETS[0], "word"), (ALPHABETS[1], "word"), (("a", "\n"), "line")]


def natural(batch: Batch, world: World, every: str) -> Batch:
    """Wrong on purpose: a token belongs to the piece that its characters lie in, which it may itself have begun."""
    cutter, numbers = Pieces(every), torch.zeros_like(batch.token_ids)
    for row in range(len(batch)):
        ids = batch.token_ids[row, FIRST : int(batch.length[row])].tolist()
        letters = [world.letters.decode(ids[:count]) for count in range(len(ids) + 1)]
        ends = cutter.ends(letters[-1], 0, True)
        for t in range(len(ids)):
            numbers[row, FIRST + t] = sum(end <= len(letters[t]) for end in ends[:-1])
    return replace(batch, pieces=numbers)


@pytest.mark.parametrize(("alphabet", "every"), CUTS)
def test_credit_by_pieces_is_exact(alphabet: tuple[str, str], every: Any) -> None:
    """With discount 1, a piece's reward-to-go on each of its tokens is exact, with baselines of all kinds as well.

    E[ sum_i sum_{t in i} grad log p(x_t) sum_{j >= i} r_j ] = grad E[ sum_j r_j ]

    What a piece was paid before one of its own tokens does no harm: which piece a token is in was known before it.
    """
    world = World(alphabet)
    plain = world.expected_step(ALL)
    assert same(Chosen(world, ALL, name="reinforce", pieces=every).step(), plain)
    assert same(Chosen(world, ALL, name="rloo", pieces=every).step(siblings=2), plain)
    values = [{prefix: 5.0 * chance(f"{number} {prefix}") for prefix in world.row_of} for number in range(3)]
    assert same(Chosen(world, ALL, name="a2c", lam=1.0, pieces=every, values=values).step(), plain)
    assert same(Chosen(world, ALL, name="vtrace", lam=1.0, pieces=every, values=values).step(), plain)
    assert same(Chosen(world, ALL, name="reinforce", baseline="value", pieces=every, values=values).step(), plain)
    true = [true_values(world, [one])[0] for one in ALL]
    for lam in (0.0, 0.5):
        assert same(Chosen(world, ALL, name="a2c", lam=lam, pieces=every, values=true).step(), plain)
        assert differ(Chosen(world, ALL, name="a2c", lam=lam, pieces=every, values=values).step(), plain)

    for chosen in (
        Chosen(world, ALL, name="reinforce", pieces=every),
        Chosen(world, ALL, name="a2c", lam=1.0, pieces=every, values=values),
    ):
        step = chosen.step(credit=lambda batch, chosen=chosen: chosen.credit(natural(batch, world, every)))
        assert differ(step, plain)


@pytest.mark.parametrize(("alphabet", "every"), CUTS)
def test_a_pieces_marks_are_paid_within_it(alphabet: tuple[str, str], every: Any) -> None:
    """A piece ends with the token that showed its end: there its own marks are paid, hence to all of its tokens.

    Which piece a token belongs to is the number of ends that were known before it.
    """
    world = World(alphabet)
    reward = ir.reward(every=every, name="pieces")(lambda view: 1.0)
    batch = Chosen(world, [reward], name="reinforce", pieces=every).batch()
    known: dict[tuple[int, ...], set[int]] = {}
    for row, t in batch.mask.nonzero().tolist():
        before = tuple(batch.token_ids[row, FIRST:t].tolist())
        known.setdefault(before, set()).add(int(batch.pieces[row, t]))
    assert all(len(numbers) == 1 for numbers in known.values()), "known before the token"
    assert {number for numbers in known.values() for number in numbers} >= {0, 1}
    for row in range(len(batch)):
        on = batch.mask[row]
        numbers, paid = batch.pieces[row][on].tolist(), batch.rewards[row, 0][on].tolist()
        assert numbers == sorted(numbers)
        assert set(numbers) == set(range(numbers[-1] + 1)), "none is left out"
        for t, value in enumerate(paid[:-1]):
            assert bool(value) == (numbers[t] != numbers[t + 1]), "paid where it ends"


def test_one_ratio_for_each_piece() -> None:
    """A piece is one action: its ratio is the product over its tokens, its surrogate counts once.

    -(1 / texts) sum_i min(ratio_i A_i, clip(ratio_i) A_i),  ratio_i = prod_{t in i} (p / q)(x_t)
    """
    world, sampler = World(ALPHABETS[1]), World(ALPHABETS[1], seed=1)
    options = {"name": "reinforce", "loss": "clipped", "pieces": "word", "clip_low": 0.5, "clip_high": 0.9}
    on_policy = Chosen(world, ALL, ratio="piece", **options)
    assert same(on_policy.step(), Chosen(world, ALL, ratio="token", **options).step())
    assert same(on_policy.step(), world.expected_step(ALL))

    chosen = Chosen(world, ALL, sampler=sampler, ratio="piece", **options)

    def by_hand(logprobs: Tensor, part: Batch) -> LossOutput:
        total = torch.zeros((), dtype=torch.float64)
        on = part.mask[0]
        for number in range(int(part.pieces[0][on].max()) + 1):
            inside = on & (part.pieces[0] == number)
            ratio = (logprobs[0] - part.old_logprobs[0])[inside].sum().exp()
            advantage = part.advantages[0][inside].unique()
            assert len(advantage) == 1, "one advantage for each piece"
            total = total + torch.minimum(ratio * advantage, ratio.clamp(0.5, 1.9) * advantage).sum()
        return LossOutput(-total)

    assert same(chosen.step(), chosen.step(loss=by_hand))
    token = Chosen(world, ALL, sampler=sampler, ratio="token", **options)
    assert angle_differs(chosen.step(), token.step())

    def counted_often(logprobs: Tensor, part: Batch) -> LossOutput:
        """Wrong on purpose: the surrogate of a piece once for each of its tokens."""
        ratio = torch.zeros_like(part.advantages)
        gap = torch.where(part.mask, logprobs - part.old_logprobs, 0.0)
        for number in part.pieces[0][part.mask[0]].unique().tolist():
            inside = part.mask[0] & (part.pieces[0] == number)
            ratio = torch.where(inside, gap[0][inside].sum().exp(), ratio)
        surrogate = torch.minimum(ratio * part.advantages, ratio.clamp(0.5, 1.9) * part.advantages)
        return LossOutput(-losses.average(surrogate, part, "text"))

    assert angle_differs(chosen.step(loss=counted_often), chosen.step())


class Apart(World):
    """Tokens that are drawn apart from each other: the chances depend on the place alone, and no text ends early."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        with torch.no_grad():
            for prefix, row in self.row_of.items():
                self.logits[row] = self.logits[self.row_of[(0,) * len(prefix)]]
            self.logits[:, END] = -60.0


def test_instant_is_exact_where_later_rewards_do_not_depend_on_a_token() -> None:
    """Credited with its own reward alone, a token has the exact gradient if nothing later depends on it; else not.

    E[ grad log p(x_t) sum_{s > t} r_s ] = 0  if r_s hangs on x_s alone and x_s is drawn apart from x_t
    """
    own = ir.reward(every="token", name="own")(lambda view: chance(f"{len(view.text)} {view.piece}"))
    paired = ir.reward(every="token", name="paired")(lambda view: chance(view.text[-2:]))

    apart = Apart()
    assert same(Chosen(apart, [own], name="instant", baseline="none").step(), apart.expected_step([own]))
    assert same(Chosen(apart, [own], name="instant").step(siblings=2), apart.expected_step([own]))
    dependent = Chosen(apart, [paired], name="instant", baseline="none").step()
    assert angle_differs(dependent, apart.expected_step([paired])), "a reward that depends on the token before"
    world = World()
    drawn = Chosen(world, [own], name="instant", baseline="none").step()
    assert angle_differs(drawn, world.expected_step([own])), "chances that depend on the token before, and the end"


def test_instant_pays_a_word_to_its_own_tokens() -> None:
    """Each token of a word gets all of the word's reward, and nothing of any other's; the KL keeps its reward-to-go."""
    world = World(ALPHABETS[1])
    chosen = Chosen(world, [WORDS], name="instant", baseline="none", reference=World(ALPHABETS[1], seed=1), kl=0.5)
    batch = chosen.batch()
    for row, rollout in enumerate(world.rollouts([WORDS])):
        assert _own(rollout) == pytest.approx(
            [
                float(batch.advantages[row, t]) - 0.5 * float(batch.rewards[row, 1, t:][batch.mask[row, t:]].sum())
                for t in range(FIRST, len(rollout.token_ids))
            ]
        )


def _own(rollout: Rollout) -> list[float]:
    return [
        sum(mark.value for mark in rollout.marks if mark.start <= t < mark.end)
        for t in range(FIRST, len(rollout.token_ids))
    ]


@pytest.mark.parametrize("seed", range(4))
def test_folding_against_a_plain_loop(seed: int) -> None:
    """Tokens to pieces and back: sums, first tokens, copies; whatever stands where the mask is off, numbers included.

    sum: F[p] = sum_{t in p} x[t];   first: F[p] = x[first t in p];   back: x[t] = F[piece of t]
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 9, generator=generator) < 0.6
    mask[:, 0] = False
    begins = (torch.rand(6, 9, generator=generator) < 0.5) & mask
    first = mask & (mask.long().cumsum(1) == 1)
    numbers = (begins | first).long().cumsum(1) - 1
    junk = torch.randint(0, 9, (6, 9), generator=generator)  # prompts and other speakers have numbers too
    pieces = torch.where(mask, numbers, junk)
    values = torch.where(mask, torch.randn(6, 9, generator=generator, dtype=torch.float64), torch.nan)
    wanted = {take: torch.zeros(6, 9, dtype=torch.float64) for take in ("sum", "first")}
    for row, t in mask.nonzero().tolist():
        piece = int(pieces[row, t])
        wanted["sum"][row, piece] += values[row, t]
        if not (mask[row, :t] & (pieces[row, :t] == piece)).any():
            wanted["first"][row, piece] = values[row, t]
    for take, one in wanted.items():
        assert same(credit.fold(values, mask, pieces, take), one)
        back = credit.unfold(one, mask, pieces)
        assert not back[~mask].any()
        assert all(back[row, t] == one[row, pieces[row, t]] for row, t in mask.nonzero().tolist())
    unmasked = credit.fold(values.nan_to_num(), torch.ones_like(mask), pieces, "first")
    assert differ(unmasked, wanted["first"]), "the mask ignored"


def test_a_pieces_value_is_that_of_the_text_before_it() -> None:
    """With words as actions, GAE by hand: the value before a word's first token, the word's rewards, the next word's.

    delta_i = sum_{t in i} r_t + g V(before word i+1) - V(before word i),   A_i = delta_i + g lambda A_{i+1}
    """
    world = World(ALPHABETS[1])
    values = [{prefix: 5.0 * chance(f"{number} {prefix}") for prefix in world.row_of} for number in range(2)]
    batch = Chosen(world, [FINAL, TOKENS], name="a2c", lam=0.7, pieces="word", discount=0.9, values=values).batch()
    for row in range(len(batch)):
        places = batch.mask[row].nonzero().flatten()
        words = [places[batch.pieces[row][places] == number] for number in range(int(batch.pieces[row].max()) + 1)]
        wanted = torch.zeros_like(batch.advantages[row])
        for source in range(2):
            ahead = running = 0.0
            for word in reversed(words):
                before = float(batch.values[row, source, word[0]])
                running = float(batch.rewards[row, source, word].sum()) + 0.9 * ahead - before + 0.63 * running
                ahead = before
                wanted[word] += running
        assert same(batch.advantages[row], wanted)
