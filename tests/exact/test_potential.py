"""Potential shaping leaves the gradient as it was, whatever the potential is; each part of its formula is needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import instant_reward as ir
from exact.world import ALPHABETS, EXACT, PROMPT, World, chance, same
from instant_reward import credit
from instant_reward.batch import collate
from instant_reward.credit import Source
from instant_reward.rewards.shaping import Potential, Shaping
from instant_reward.rewards.watch import Watch
from instant_reward.types import Rollout

torch.set_num_threads(1)
FIRST = len(PROMPT.token_ids)
LINES = ("a", "\n")  # a line has ended with its newline, so that the end token after it belongs to no piece


def phi(text: str) -> float:
    """Another score without any pattern; what it says of the empty text is never asked."""
    assert text, "the potential of the empty text is no part of the shaping"
    return 2.0 * chance(f"potential of {text}")


def second_blank(characters: str) -> int | None:
    """Pieces end before each blank but a leading one: it is known as soon as the blank is there."""
    found = characters.find(" ", 1)
    return found if found > 0 else None


CUTS: list[tuple[tuple[str, str], Any]] = [
    *[(alphabet, every) for alphabet in ALPHABETS for every in ("token", "word", "end", 2, 3, second_blank)],
    (LINES, "line"),
    (LINES, lambda characters: len(characters) >= 2),
]
final = ir.reward(name="final")(lambda view: chance(view.text))
Step = Callable[[Potential, Any, Any, float], float]


def wrong(step: Step, every: Any, discount: float, shaping: type[Shaping] = Shaping) -> Shaping:
    """Shaping that pays something else: ``step(potential, state, view, now)``."""

    class Wrong(Potential):
        def _step(self, state: Any, view: ir.View, now: float) -> float:
            value = step(self, state, view, now)
            state.potential, state.sampled = now, view.sampled
            return value

    return shaping(Wrong(phi, discount, False), "wrong", every, discount=discount, takes="state")


def right(one: Potential, state: Any, view: ir.View, now: float) -> float:
    tokens = view.sampled - state.sampled
    return one.discount * now - one.discount ** (1 - tokens) * state.potential


def told_one_early(rollout: Rollout) -> Rollout:
    """Wrong on purpose: each mark of the shaping one token too early."""
    marks = [
        mark if mark.source == "final" else replace(mark, seen=max(FIRST + 1, mark.seen - 1)) for mark in rollout.marks
    ]
    return replace(rollout, marks=marks)


def told_at_its_end(rollout: Rollout) -> Rollout:
    """Wrong on purpose: each mark at the last token of its piece, though a later one showed that it had ended."""
    return replace(rollout, marks=[replace(mark, seen=mark.end) for mark in rollout.marks])


def caught(step: torch.Tensor, exact: torch.Tensor) -> bool:
    """No matter of rounding."""
    return float((step - exact).abs().max()) > 1e-4


def to_go(rollouts: list[Rollout], reward: ir.Reward) -> torch.Tensor:
    """The discounted reward-to-go of each token: ``[texts, L]``."""
    assert reward.discount is not None
    batch = collate(rollouts, [Source(reward.name, 1.0, reward.discount)], dtype=torch.float64)
    rewards = credit.place(batch.marks, batch.sources, batch.mask)
    return credit.reward_to_go(rewards[:, 0], batch.mask, reward.discount)


@pytest.mark.parametrize(("alphabet", "every"), CUTS)
@pytest.mark.parametrize("discount", [0.5, 0.95])
def test_shaping_leaves_the_gradient_as_it_was(alphabet: tuple[str, str], every: Any, discount: float) -> None:
    """Beside a final reward, the shaping of any potential changes nothing in expectation, wherever pieces end.

    F_i = g phi_i - g**(1 - k_i) phi_{i-1},  phi(end) = 0
    E[ sum_t grad log p(x_t) sum_{t_i >= t} g**(t_i - t) F_i ] = 0
    """
    world = World(alphabet)
    shaping = ir.potential(phi, discount, every, weight=1.5)
    exact = world.gradient([chance(rollout.text) for rollout in world.rollouts([])])
    assert same(world.expected_step([final, shaping]), exact)
    assert same(world.expected_step([shaping]), torch.zeros_like(exact))
    # The final reward may have a discount of its own, and its gradient then stays what it was as well.
    assert same(world.expected_step([final.but(discount=0.7), shaping]), world.expected_step([final.but(discount=0.7)]))
    if every != "end":
        assert any(mark.value for rollout in world.rollouts([shaping]) for mark in rollout.marks), "nothing was paid"


@pytest.mark.parametrize(("alphabet", "every"), CUTS)
@pytest.mark.parametrize("discount", [0.5, 1.0])
def test_what_a_token_gets_hangs_on_the_text_before_it_alone(
    alphabet: tuple[str, str], every: Any, discount: float
) -> None:
    """The shaping in a token's reward-to-go is the last potential that was paid before it, also amid a piece.

    sum_{t_i >= t} g**(t_i - t) F_i = -g**(t_j + 1 - t) phi_j,  t_j < t the last payment before t (none: 0)
    """
    world = World(alphabet)
    shaping = ir.potential(phi, discount, every)
    told: dict[int, list[tuple[int, float]]] = {}  # by text: the index of each payment, and the potential then

    class Spy(Potential):
        def _step(self, state: Any, view: ir.View, now: float) -> float:
            told[len(told) - 1].append((FIRST + view.sampled - 1, now))
            return super()._step(state, view, now)

        def start(self, prompt: ir.Prompt) -> Any:
            told[len(told)] = []
            return super().start(prompt)

    rollouts = world.rollouts([shaping.but(function=Spy(phi, discount, False))])
    assert [rollout.marks for rollout in rollouts] == [rollout.marks for rollout in world.rollouts([shaping])]
    returns = to_go(rollouts, shaping)
    of_prefix: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for number, rollout in enumerate(rollouts):
        for t in range(FIRST, len(rollout.token_ids)):
            at, potential = next(((at, now) for at, now in reversed(told[number]) if at < t), (t, 0.0))
            assert returns[number, t].item() == pytest.approx(-(discount ** (at + 1 - t)) * potential, abs=EXACT)
            of_prefix[tuple(rollout.token_ids[:t])].append(returns[number, t].item())
    assert max(max(values) - min(values) for values in of_prefix.values()) <= EXACT
    assert len(of_prefix) == len(world.row_of)


@pytest.mark.parametrize(("alphabet", "every"), CUTS)
def test_the_discounted_sum_is_nothing(alphabet: tuple[str, str], every: Any) -> None:
    """The discounted marks of a text sum to 0: no text earns anything by its shaping.

    sum_i g**(t_i) F_i = g**(T) phi(end) = 0
    """
    shaping = ir.potential(phi, 0.5, every)
    for rollout in World(alphabet).rollouts([shaping]):
        paid = [mark.value * 0.5 ** (mark.seen - FIRST) for mark in rollout.marks]
        assert sum(paid) == pytest.approx(0.0, abs=1e-12)
        assert rollout.marks[-1].seen == len(rollout.token_ids), "the end is told"


def with_an_end(one: Potential, state: Any, view: ir.View, now: float) -> float:
    return right(one, state, view, phi(f"{view.text}.") if view.done else now)


WRONG: dict[str, Step] = {
    "the discount left out": lambda one, state, view, now: now - state.potential,
    "the factor of longer pieces left out": lambda one, state, view, now: one.discount * now - state.potential,
    "the piece's own tokens counted": lambda one, state, view, now: (
        one.discount * now - one.discount ** (1 - view.tokens) * state.potential
    ),
    "a potential at the end": with_an_end,
}


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("discount", [0.5, 0.9])
def test_a_wrong_value_is_noticed(alphabet: tuple[str, str], name: str, discount: float) -> None:
    """Each part of the value is needed: without it, words of several tokens change the gradient."""
    world = World(alphabet)
    exact = world.expected_step([final])
    assert same(world.expected_step([final, wrong(right, "word", discount)]), exact)
    assert caught(world.expected_step([final, wrong(WRONG[name], "word", discount)]), exact)


@pytest.mark.parametrize("name", ["the discount left out", "a potential at the end"])
def test_a_wrong_value_is_noticed_with_pieces_of_one_token(name: str) -> None:
    """The discount and the 0 at the end are needed for one-token pieces too; there the factor is 1.

    F_t = g phi_{t+1} - phi_t
    """
    world = World()
    exact = world.expected_step([final])
    assert caught(world.expected_step([final, wrong(WRONG[name], "token", 0.5)]), exact)
    assert caught(world.expected_step([final, wrong(with_an_end, "token", 1.0)]), exact), "at discount 1 too"
    factor = WRONG["the factor of longer pieces left out"]
    assert same(world.expected_step([final, wrong(factor, "token", 0.5)]), exact)


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("every", ["token", "word"])
@pytest.mark.parametrize("discount", [0.5, 1.0])
def test_a_wrong_time_is_noticed(alphabet: tuple[str, str], every: str, discount: float) -> None:
    """Paid one token early, shaping changes the gradient; so do words paid at their last token, or on their span."""
    world = World(alphabet)
    shaping = ir.potential(phi, discount, every)
    exact = world.expected_step([final])
    assert caught(world.expected_step([final, shaping], marks=told_one_early), exact)
    if every == "word":
        assert caught(world.expected_step([final, shaping], marks=told_at_its_end), exact)


def test_an_end_that_is_not_told_is_noticed() -> None:
    """Where the last piece had ended before the end token, the end is told all the same, or the potential stays."""

    class Unaware(Shaping):
        sees_end = False

    world = World(LINES)
    exact = world.expected_step([final])
    assert same(world.expected_step([final, wrong(right, "line", 0.5)]), exact)
    assert caught(world.expected_step([final, wrong(right, "line", 0.5, Unaware)]), exact)


class Stopped(World):
    """A world in which a reward ends each text that has two blanks, while it is written."""

    def __init__(self, alphabet: tuple[str, str]) -> None:
        super().__init__(alphabet)
        cut = [text[: self._stop(text)] for text in self.texts]
        self.texts = [text for number, text in enumerate(cut) if text not in cut[:number]]

    def _stop(self, text: list[int]) -> int:
        return next((count for count in range(len(text)) if text[:count].count(1) == 2), len(text))

    def _rollout(self, watch: Watch, number: int, logprobs: torch.Tensor) -> Rollout:
        text = self.texts[number]
        early = text.count(1) == 2 and len(text) < 4  # at the last place it is cut off anyway

        def feed(row: int, token_ids: list[int], done: bool) -> Any:
            return watch.feed(row, token_ids, done and not early)

        written: Any = SimpleNamespace(open=watch.open, close=watch.close, feed=feed)
        rollout = super()._rollout(written, number, logprobs)
        return replace(rollout, stop="stopped") if early else rollout


@pytest.mark.parametrize(("alphabet", "every"), CUTS)
def test_texts_stopped_by_a_reward(alphabet: tuple[str, str], every: Any) -> None:
    """A text that a reward stopped is over: its potential is 0 there, and the gradient stays that of the others.

    grad sum_x p(x) R(x) over the stopped texts
    """
    world = Stopped(alphabet)
    blank = alphabet[1][0]
    stop = ir.reward(every="token", name="stop")(
        lambda view: ir.stop(chance(view.text)) if view.text.count(blank) == 2 else None
    )
    shaping = ir.potential(phi, 0.5, every)
    assert world.probabilities().sum().item() == pytest.approx(1.0, abs=1e-12)
    rollouts = world.rollouts([stop, shaping])
    assert any(rollout.stop == "stopped" for rollout in rollouts)
    exact = world.gradient([rollout.total("stop") for rollout in rollouts])
    assert same(world.expected_step([stop, shaping]), exact)
    assert same(world.expected_step([shaping, stop]), exact)
    for rollout in rollouts:
        assert ir.replay([shaping], rollout) == [mark for mark in rollout.marks if mark.source == "phi"]


def test_the_value_as_a_potential_leaves_what_was_not_expected() -> None:
    """With the true value as its potential, a token gets its text's score less what was to be expected before it.

    discount 1:  G_t + sum_{t_i >= t} F_i = R - V(x_<t),  from the second token on
    """
    world = World()
    weights = world.probabilities().detach()
    rollouts = world.rollouts([final])
    scores = torch.tensor([rollout.total() for rollout in rollouts], dtype=torch.float64)
    value: dict[str, float] = {}
    for prefix in world.row_of:
        within = torch.tensor([tuple(text[: len(prefix)]) == prefix for text in world.texts])
        written = "".join("a "[token] for token in prefix)
        value[written] = ((weights * scores)[within].sum() / weights[within].sum()).item()
    shaping = ir.potential(value.__getitem__, 1.0, "token", name="value")
    shaped = world.rollouts([shaping])
    returns = to_go(shaped, shaping)
    for number, rollout in enumerate(shaped):
        for t in range(FIRST + 1, len(rollout.token_ids)):
            expected = value[rollout.text[: rollout.char_ends[t - 1]]]
            assert scores[number].item() + returns[number, t].item() == pytest.approx(scores[number].item() - expected)
    assert same(world.expected_step([final, shaping]), world.expected_step([final]))
