"""What a reward is: a function that looks at the text so far and rates its newest piece.

Everything a user may hand in (a decorated function, a plain ``f(text)``, the widely used
``f(prompts, completions, **columns)``, an object with ``start`` and ``extend``) becomes one record, ``Reward``.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from instant_reward.text import Pieces
from instant_reward.types import Every, Prompt, Span, Stop, UserError, View

if TYPE_CHECKING:
    from instant_reward.config_weight import WeightRule

Takes = Literal["view", "text", "columns", "state", "pair"]
Scope = Literal["text", "group", "run"]
Value = float | None | Stop | list[float] | list[Span]


@dataclass(frozen=True)
class Reward:
    """One named source of reward.

    Attributes:
        function: what is called; see ``takes``.
        every: where pieces end.
        batched: the function takes a list of views (and of states) and returns a list.
        at: where its marks are paid: "seen" (exact) or "span" (a biased heuristic, section "credit" of the docs).
        weight: the factor of this source in the sum that is learned from.
        discount: per sampled token, for this source alone; None leaves it to the algorithm.
        takes: "view" f(view); "text" f(text); "columns" f(prompts, completions, **columns); "state" start and extend;
            "pair" f(output, target), of a given text and what the policy would have written in its place.
        rule: how the weight changes while the run goes on (``config_weight``); None keeps it.
        scaled: divide by the running deviation of what texts earn from it, so that sources of any scale weigh alike.
        clip: each of its marks is cut to so much above and below 0; None for no bound.
        train: False keeps the source out of learning; it is only measured.
        segmenter: splits a run of characters of a script without spaces into words.
        scope: what it looks at: its own "text"; its "group" (the function takes the final views of all siblings and
            returns a value for each); or the "run" (it also reads what earlier steps wrote, as it was when the step
            began: after each step its ``observe(rollouts)`` is called, and checkpoints hold its ``state_dict()``).
        stops: False where it never stops a text. What is decoded then never waits for it, however slow it is.
    """

    function: Any
    name: str
    every: Every = "end"
    batched: bool = False
    at: Literal["seen", "span"] = "seen"
    weight: float = 1.0
    discount: float | None = None
    takes: Takes = "view"
    train: bool = True
    segmenter: Callable[[str], Sequence[str]] | None = None
    scope: Scope = "text"
    rule: WeightRule | None = None
    scaled: bool = False
    clip: float | None = None
    stops: bool = True

    def __post_init__(self) -> None:
        if self.takes == "state" and inspect.isclass(self.function):
            raise UserError(f"reward '{self.name}' is a class; hand in an object of it: {self.function.__name__}(...)")
        if self.takes != "state" and not callable(self.function):
            raise UserError(f"reward '{self.name}' is {self.function!r}, which cannot be called; give a function")
        try:
            Pieces(self.every, self.segmenter)
        except UserError as error:
            raise UserError(f"reward '{self.name}': {error}") from error
        if self.at not in ("seen", "span"):
            raise UserError(f"reward '{self.name}': at={self.at!r} is unknown; use 'seen' or 'span'")
        if self.scope not in ("text", "group", "run"):
            raise UserError(f"reward '{self.name}': scope={self.scope!r} is unknown; use 'text', 'group' or 'run'")
        if self.scope == "group" and (self.every != "end" or not self.batched):
            raise UserError(
                f"reward '{self.name}': scope='group' compares finished siblings; leave every at 'end', set "
                "batched=True and return a value for each view"
            )
        if self.scope == "run" and not callable(getattr(self.function, "observe", None)):
            raise UserError(
                f"reward '{self.name}': scope='run' needs an object with observe(rollouts), which is told what each "
                "step wrote; give it one"
            )
        if not math.isfinite(self.weight):
            raise UserError(f"reward '{self.name}': weight={self.weight!r} is not a finite number; give one")
        if self.clip is not None and not self.clip > 0.0:
            raise UserError(f"reward '{self.name}': clip={self.clip!r} is not above 0; give a bound that is, or None")
        if self.discount is not None and not 0.0 <= self.discount <= 1.0:
            raise UserError(
                f"reward '{self.name}': discount={self.discount!r} is not between 0 and 1; give one that is"
            )

    @property
    def sees_end(self) -> bool:
        """Whether it is asked about an empty last piece where a text ends behind its last piece (a line and the end
        token), so that it always learns of the end: where its object has ``sees_end = True``."""
        return bool(getattr(self.function, "sees_end", False))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped function as it is."""
        return self.function(*args, **kwargs)

    def but(self, **changes: Any) -> Reward:
        """The same reward with some fields changed, e.g. ``polite.but(weight=0.5)``."""
        return replace(self, **changes)

    def start(self, prompt: Prompt) -> Any:
        """The state of a text that has just begun; None where the reward keeps none."""
        return self.function.start(prompt) if self.takes == "state" else None

    def rate(self, views: Sequence[View], states: Sequence[Any]) -> Any:
        """What the function hands back: a list with something for each view, if it did as it should."""
        if self.takes == "columns":
            return self._rate_columns(views)
        if self.takes == "pair":
            if any("output" not in view.info for view in views):
                raise UserError("it compares a given text with the policy's output, which there is in fit alone")
            return [self.function(view.info["output"], view.text) for view in views]
        if self.takes == "state":
            if self.batched:
                return _several(self.function.extend(list(states), list(views)))
            return [self.function.extend(state, view) for state, view in zip(states, views, strict=True)]
        inputs: list[Any] = [view.text for view in views] if self.takes == "text" else list(views)
        if self.batched:
            return _several(self.function(inputs))
        return [self.function(item) for item in inputs]

    def _rate_columns(self, views: Sequence[View]) -> Any:
        """The convention of other libraries: lists of prompts and completions, the data's columns by name."""
        chat = [view.prompt.messages is not None for view in views]
        prompts = [
            view.prompt.messages if is_chat else view.prompt.text for view, is_chat in zip(views, chat, strict=True)
        ]
        completions = [
            [{"role": "assistant", "content": view.text}] if is_chat else view.text
            for view, is_chat in zip(views, chat, strict=True)
        ]
        columns: dict[str, list[Any]] = {}
        for key in dict.fromkeys(key for view in views for key in view.info):
            columns[key] = [view.info.get(key) for view in views]
        columns |= {"prompts": prompts, "completions": completions}  # data columns of these names give way
        parameters = inspect.signature(self.function).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            names = {parameter.name for parameter in parameters}
            columns = {key: column for key, column in columns.items() if key in names}
        return _several(self.function(**columns))


def reward(
    every: Every = "end",
    batched: bool = False,
    name: str | None = None,
    *,
    at: Literal["seen", "span"] = "seen",
    weight: float = 1.0,
    discount: float | None = None,
    segmenter: Callable[[str], Sequence[str]] | None = None,
    scope: Scope = "text",
    stops: bool = True,
) -> Callable[[Any], Reward]:
    """Makes a reward of a function ``f(view)``, or of an object with ``start(prompt)`` and ``extend(state, view)``.

    The function rates the newest piece of the text so far. It may hand back a float (the piece), a list of floats (one
    per token of the piece), ``view.span(...)`` or a list of them, ``ir.stop(value)``, or None.

    Args:
        every: "token", "word", "sentence", "line", "end", a number of tokens, or a callable that gets the characters
            since the last piece ended and returns True (a piece ends here), a length in characters, or None.
        batched: the function gets a list of views and returns a list as long.
        name: the source's name in marks and metrics; the function's name where it is not given.
        at: "seen" pays a mark where it became known (exact); "span" pays it on the piece's own tokens (biased).
        scope: "text", "group" (the function gets the final views of all siblings) or "run"; see ``Reward``.
        stops: False promises that it never hands back ``ir.stop``: a slow reward (a judge, another machine) then rates
            beside the decoding without ever holding it up. Of one that may, every token's verdict is waited for.

    Raises:
        UserError: where ``every`` or another argument is not one of these.
    """
    if callable(every) and not isinstance(every, str | int) and _looks_like_reward(every):
        raise UserError("@ir.reward was used without brackets; write @ir.reward(every=...) above the function")

    def wrap(function: Any) -> Reward:
        takes: Takes = "state" if _keeps_state(function) else "view"
        return Reward(
            function=function,
            name=name or _name_of(function),
            every=every,
            batched=batched or scope == "group",
            at=at,
            weight=weight,
            discount=discount,
            takes=takes,
            segmenter=segmenter,
            scope=scope,
            stops=stops,
        )

    wrap.waits_for_a_function = True  # type: ignore[attr-defined]  # so that `as_reward` can tell what is missing
    return wrap


def stop(value: float | None = None) -> Stop:
    """Rates the newest piece with ``value`` (None: not at all) and ends this text here."""
    return Stop(value)


def as_reward(candidate: Any) -> Reward:
    """A ``Reward`` of whatever a user hands in; a plain function becomes a final score.

    An object may say by attributes what ``ir.reward`` takes as arguments: ``name``, ``every``, ``batched``, ``scope``,
    ``segmenter``, ``stops``.

    Raises:
        UserError: where it is no function, or one whose arguments fit no known form.
    """
    if isinstance(candidate, Reward):
        return candidate
    own = {
        key: getattr(candidate, key)
        for key in ("every", "batched", "scope", "segmenter", "stops")
        if hasattr(candidate, key)
    }
    if _keeps_state(candidate):
        return Reward(candidate, _name_of(candidate), takes="state", **own)
    if not callable(candidate):
        raise UserError(
            f"{candidate!r} is no reward; give a function f(text) -> float or one decorated with @ir.reward(every=...)"
        )
    if hasattr(candidate, "waits_for_a_function"):
        raise UserError(
            "an @ir.reward has no function yet; write @ir.reward(every=...), with brackets, above a function"
        )
    try:
        parameters = list(inspect.signature(candidate).parameters.values())
    except ValueError:  # builtins without a signature, such as `len`
        return Reward(candidate, _name_of(candidate), takes="text")
    if "completions" in {parameter.name for parameter in parameters}:
        return Reward(candidate, _name_of(candidate), takes="columns", **{**own, "batched": True})
    if [parameter.name for parameter in parameters] == ["output", "target"]:
        return Reward(candidate, _name_of(candidate), takes="pair", stops=False)
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keyword_only = [p.name for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    if len(needed) > 1 or keyword_only or not parameters:
        raise UserError(
            f"reward '{_name_of(candidate)}' takes ({', '.join(p.name for p in parameters)}); write it as f(text), as "
            "f(prompts, completions, **columns), as f(output, target) for given texts, or as f(view) "
            "under @ir.reward(every=...)"
        )
    first = (needed or parameters)[0]
    hint = first.annotation if isinstance(first.annotation, str) else getattr(first.annotation, "__name__", "")
    sees_views = first.name in ("view", "views") or hint.rpartition(".")[2] == "View"
    return Reward(candidate, _name_of(candidate), takes="view" if sees_views else "text", **own)


def as_rewards(candidates: Sequence[Any]) -> list[Reward]:
    """Every candidate as a ``Reward``; two of one name are told apart by a number.

    Raises:
        UserError: where ``candidates`` is no list.
    """
    if isinstance(candidates, str) or not isinstance(candidates, Sequence):
        raise UserError(f"rewards must be a list of reward functions, not {type(candidates).__name__}; wrap it in [ ]")
    rewards = [as_reward(candidate) for candidate in candidates]
    own = {one.name for one in rewards}
    named: list[Reward] = []
    taken: set[str] = set()
    for one in rewards:
        names = (f"{one.name}_{number}" for number in itertools.count(2))
        name = one.name if one.name not in taken else next(name for name in names if name not in own | taken)
        taken.add(name)
        named.append(one if name == one.name else one.but(name=name))
    return named


def as_score(candidate: Any, who: str) -> Reward:
    """A final score, ``f(text) -> float``, that something else is made of.

    Args:
        who: what is made of it, as it continues a sentence: "ir.change compares scores of texts".

    Raises:
        UserError: it takes anything but a text, or looks beyond it, or has settings that would be lost.
    """
    one = as_reward(candidate)
    if one.takes != "text":
        raise UserError(f"{who}, and '{one.name}' takes no text; give it f(text) -> float")
    if one.scope != "text":
        raise UserError(
            f"{who}, and '{one.name}' looks beyond its text (scope='{one.scope}'); give it f(text) -> float"
        )
    if lost := own_settings(one):
        raise UserError(f"{who}, and the {lost[0]} of '{one.name}' would be lost; set it on what is made of it")
    return one


def own_settings(one: Reward) -> list[str]:
    """What a reward says about how it is learned from: of no use where it becomes a part of another one."""
    plain = {"at": "seen", "weight": 1.0, "discount": None, "train": True, "rule": None, "scaled": False, "clip": None}
    return ["weight" if key == "rule" else key for key, usual in plain.items() if getattr(one, key) != usual]


def _several(values: Any) -> Any:
    """What a batched function gave as a list: it may have given an array, a tensor or an iterator."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    return list(plain) if isinstance(plain, Iterable) and not isinstance(plain, str | bytes | Mapping) else plain


def _keeps_state(candidate: Any) -> bool:
    return callable(getattr(candidate, "start", None)) and callable(getattr(candidate, "extend", None))


def _name_of(candidate: Any) -> str:
    return str(getattr(candidate, "name", None) or getattr(candidate, "__name__", None) or type(candidate).__name__)


def _looks_like_reward(function: Any) -> bool:
    """A bare ``@ir.reward`` hands us the reward function itself; its argument is then a view."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return names[:1] == ["view"] or names[:1] == ["views"]
