"""Placing marks on tokens and summing them, against plain loops over sampled tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.world import PLAIN, World, chance, same
from instant_reward import credit
from instant_reward.batch import collate
from instant_reward.credit import Marks, Source
from instant_reward.crediting import credit_batch

torch.set_num_threads(1)
ROWS, LENGTH = 5, 10
SOURCES = [Source("one", discount=0.7), Source("two", discount=0.9, at="span"), Source("three", at="span")]


def random_marks(seed: int, count: int = 40) -> tuple[Marks, Tensor]:
    """Marks on any tokens from the first sampled one on, and a mask with gaps and padding."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    mask = torch.rand(ROWS, LENGTH, generator=generator) < 0.6
    mask[:, :2], mask[:, 2] = False, True
    table = []
    for _ in range(count):
        start = whole(2, LENGTH)
        end = whole(start + 1, LENGTH + 1)
        table.append((whole(0, ROWS), whole(0, len(SOURCES)), start, end, whole(end, LENGTH + 1)))
    columns = [torch.tensor(column) for column in zip(*table, strict=True)]
    return Marks(*columns, value=torch.randn(count, generator=generator, dtype=torch.float64)), mask


def reference_returns(marks: Marks, mask: Tensor) -> Tensor:
    """What each sampled token is owed by the rule, mark by mark: ``[B, K, L]``.

    seen: g**(sampled tokens until the one it is paid at), that one and all before it.
    span: the value in full within the piece, discounted by the sampled tokens before it, nothing after it.
    """
    owed = torch.zeros(ROWS, len(SOURCES), LENGTH, dtype=torch.float64)
    fields = (marks.row, marks.source, marks.start, marks.end, marks.seen, marks.value)
    for row, source, start, end, seen, value in zip(*(field.tolist() for field in fields), strict=True):
        known = seen if SOURCES[source].at == "seen" else end
        paid = max(t for t in range(known) if mask[row, t])
        first = paid if SOURCES[source].at == "seen" else min(start, paid)
        for t in range(paid + 1):
            if mask[row, t]:
                between = sum(bool(mask[row, s]) for s in range(t, first))
                owed[row, source, t] += value * SOURCES[source].discount ** between
    return owed


@pytest.mark.parametrize("seed", range(6))
def test_marks_are_owed_by_the_rule(seed: int) -> None:
    """``place`` then ``reward_to_go`` give each token what the credit rule says, for both placements."""
    marks, mask = random_marks(seed)
    rewards = credit.place(marks, SOURCES, mask)
    owed = reference_returns(marks, mask)
    for index, source in enumerate(SOURCES):
        assert same(credit.reward_to_go(rewards[:, index], mask, source.discount), owed[:, index])
    assert not rewards.transpose(1, 2)[~mask].any()
    late = replace(marks, seen=(marks.seen + 1).clamp(max=LENGTH), end=marks.end)
    assert not same(credit.place(late, SOURCES, mask), rewards)


def test_totals_are_preserved() -> None:
    """Undiscounted, every mark is on the tokens once: the sums of a text's rewards are the sums of its marks."""
    marks, mask = random_marks(9)
    plain = [replace(source, discount=1.0) for source in SOURCES]
    rewards = credit.place(marks, plain, mask)
    wanted = torch.zeros(ROWS, len(SOURCES), dtype=torch.float64)
    wanted.index_put_((marks.row, marks.source), marks.value, accumulate=True)
    assert same(rewards.sum(2), wanted)
    for index in range(len(SOURCES)):
        total = credit.whole_return(rewards[:, index], mask)
        assert same(total, torch.where(mask, wanted[:, index : index + 1], 0.0))


def test_no_marks_and_marks_of_the_prompt() -> None:
    """No marks are no rewards; a mark that nobody sampled for is a mistake and says so."""
    marks, mask = random_marks(0)
    none = Marks(*(field[:0] for field in (marks.row, marks.source, marks.start, marks.end, marks.seen, marks.value)))
    assert not credit.place(none, SOURCES, mask).any()
    early = replace(marks, start=marks.start * 0, end=marks.end * 0 + 1, seen=marks.seen * 0 + 1)
    with pytest.raises(AssertionError, match="before the first sampled token"):
        credit.place(early, SOURCES, mask)


def test_reward_to_go_against_a_plain_loop() -> None:
    """G[t] = r[t] + g G[next sampled token], in the dtype of the rewards, for any kind of mask."""
    marks, mask = random_marks(3)
    del marks
    rewards = torch.randn(ROWS, LENGTH, generator=torch.Generator().manual_seed(3))
    found = credit.reward_to_go(rewards, mask.float(), 0.8)
    assert found.dtype == torch.float32
    for row in range(ROWS):
        own = rewards[row][mask[row]].tolist()
        wanted = [sum(0.8 ** (s - t) * own[s] for s in range(t, len(own))) for t in range(len(own))]
        assert found[row][mask[row]].tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert not found[~mask].any()


def test_summed_over_the_text_a_span_counts_once() -> None:
    """Where timing is ignored, a reward placed on its span counts as often as one that is not: once.

    sum_t r_t = the sum of its marks, whatever the source's discount and placement.
    """
    world = World()
    words = ir.reward(every="word", name="words")(lambda view: chance(view.text))
    rollouts = [replace(rollout, group=number % 4) for number, rollout in enumerate(world.rollouts([words]))]
    for scale in ("none", "group", "batch"):
        preset = replace(PLAIN, returns="whole", scale=scale, baseline="group_mean")
        one, other = (
            credit_batch(collate(rollouts, [Source("words", 1.0, discount, at)], dtype=torch.float64), preset)
            for discount, at in ((1.0, "seen"), (0.5, "span"))
        )
        assert same(one.advantages, other.advantages)
        assert one.advantages.any()

    deviation = replace(PLAIN, scale="group")
    spans = [Source("words", 1.0, 0.5, "span")]
    scaled = credit_batch(collate(rollouts, spans, dtype=torch.float64), deviation)
    totals = torch.tensor([rollout.total() for rollout in rollouts], dtype=torch.float64)
    wanted = scaled.returns / credit.group_deviation(totals, scaled.group)[:, None]
    assert same(scaled.advantages, wanted)
