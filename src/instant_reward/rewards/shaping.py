"""Potential-based shaping: a reward that tells a text early how well it goes, and leaves the gradient as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from instant_reward.rewards.base import Reward, as_score
from instant_reward.types import Every, Prompt, UserError, View


@dataclass
class _Told:
    """The state of one text: the potential that was paid last, and after how many sampled tokens."""

    potential: float = 0.0
    sampled: int = 0


class Potential:
    """Pays ``discount * phi(now) - discount**(1 - k) * phi(before)`` at each piece; see ``potential``.

    ``k`` counts the sampled tokens since the last payment. It is no count of the piece's own tokens: a piece is paid at
    the token that showed that it had ended.
    """

    sees_end = True
    rereads = True

    def __init__(self, phi: Callable[[Any], Any], discount: float, batched: bool) -> None:
        self.phi = phi
        self.discount = discount
        self.batched = batched

    def start(self, prompt: Prompt) -> _Told:
        """Nothing is paid for the empty text: every text begins with the same potential, so it is left out."""
        return _Told()

    def extend(self, state: Any, view: Any) -> Any:
        """What this piece is paid; lists of states and views where ``batched``."""
        if not self.batched:
            return self._step(state, view, 0.0 if view.done else float(self.phi(view.text)))
        states: Sequence[_Told] = state
        views: Sequence[View] = view
        texts = [one.text for one in views if not one.done]  # the potential after the end is 0, whatever phi says
        known = [float(value) for value in self.phi(texts)] if texts else []
        if len(known) != len(texts):
            raise UserError(f"phi gave {len(known)} values for {len(texts)} texts; return one for each")
        values = iter(known)
        now = [0.0 if one.done else next(values) for one in views]
        return [self._step(*each) for each in zip(states, views, now, strict=True)]

    def _step(self, state: _Told, view: View, now: float) -> float:
        tokens = view.sampled - state.sampled
        try:
            before = self.discount ** (1 - tokens) * state.potential
        except OverflowError:
            raise UserError(
                f"a discount of {self.discount} over {tokens} tokens makes too large a number; use shorter pieces or a "
                "discount nearer to 1"
            ) from None
        state.potential, state.sampled = now, view.sampled
        return self.discount * now - before


@dataclass(frozen=True)
class Shaping(Reward):
    """A reward made by ``potential``: its discount and placement are part of what it pays, and cannot be changed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        made_for = self.function.discount
        if self.discount != made_for:
            raise UserError(
                f"reward '{self.name}': it was shaped for discount={made_for} and biases the gradient with "
                f"discount={self.discount!r}; give ir.potential the discount and leave it out here"
            )
        if self.at != "seen":
            raise UserError(f"reward '{self.name}': shaping is exact only where at='seen'; leave at={self.at!r} out")
        if self.clip is not None:
            raise UserError(
                f"reward '{self.name}': what shaping pays is paid back whole, and clip={self.clip!r} would bias the "
                "gradient; leave it out"
            )
        if self.scaled:
            raise UserError(
                f"reward '{self.name}': shaping earns a text nothing in all, so there is no deviation to scale it by; "
                "leave scaled out"
            )


def potential(
    phi: Callable[[Any], Any],
    discount: float,
    every: Every = "word",
    *,
    name: str | None = None,
    batched: bool = False,
    weight: float = 1.0,
) -> Reward:
    """Potential-based shaping, to be added beside a final reward: it moves reward to where it was earned.

    Ng, Harada and Russell (1999), theorem 1, ``F = discount * phi(next) - phi(now)`` per token, with pieces: a mark
    that comes ``k`` sampled tokens after the last one is ``discount * phi(now) - discount**(1 - k) * phi(before)``.
    Under reward-to-go with the same discount, the shaping that a token sees is ``-discount**-j * phi(before)``, where
    ``j`` tokens lie between the last payment and it: that hangs on the text before the token alone, so the expected
    gradient stays what it was, whatever ``phi`` is. A ``phi`` near the value of a text (what it can still be expected
    to earn) takes most of the noise away. The discounted marks of a text sum to 0.

    After the end of a text the potential is 0, and ``phi`` is not asked: where it ended, was stopped, and where it was
    cut off by length, since that ends it too for a method without a critic. A critic's value of what would have come
    after the cut must leave this source out: its potential was already paid back.

    Only reward-to-go with this discount cancels the shaping: a plain sum over the text does so with discount 1 alone,
    and paying each piece on its own never does. A piece of many tokens under a small discount pays large sums
    (``0.9**-40`` is 68): use short pieces or a discount near 1.

    Args:
        phi: ``f(text) -> float``; with ``batched``, ``f(list of texts) -> list of floats``. Of the text so far, never
            empty.
        discount: per sampled token, above 0 and at most 1; it becomes the source's discount. That of the final reward
            may be another one.
        every: where pieces end, as for ``ir.reward``.
        name: the source's name; phi's where it is not given.

    Raises:
        UserError: where ``phi`` takes anything but a text or has a weight or another setting that would be lost, or
            ``discount`` is not such a number.
    """
    one = as_score(phi, "ir.potential asks phi about texts")
    if isinstance(discount, bool) or not isinstance(discount, int | float) or not 0.0 < discount <= 1.0:
        raise UserError(f"ir.potential: discount={discount!r} is not above 0 and at most 1; give a number that is")
    batched = batched or one.batched
    return Shaping(
        function=Potential(one.function, float(discount), batched),
        name=name or one.name,
        every=every,
        batched=batched,
        weight=weight,
        discount=float(discount),
        takes="state",
        stops=False,
        segmenter=one.segmenter,
    )
