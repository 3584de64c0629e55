"""A value for every token of a growing text, in the tokens of the model that gives it.

**The rule.** The model has a tokenizer of its own, and the last tokens of an unfinished text may become others when it
goes on. After each piece, what was paid is the sum of the values of the tokens that the text has so far: new tokens are
paid as they are, and where a tail was cut anew, what its old tokens had been paid is taken back. So at every piece the
sum is that of one pass over the text so far, and over the whole text that of one pass over the finished text; nothing
is lost or paid twice. Tokens that stay as they are (up to the end of a word, with nearly every tokenizer) are paid what
the one pass gives them, with their piece.

Each value is a span of the characters that its token covers, and the watcher lays it on those of the policy's tokens
that carry these characters. Spans that overlap (the bytes of one character, the old and new tokens of a tail) are added
up and paid together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from instant_reward.rewards.language_model import Frozen, Job, Measure, Memory, common
from instant_reward.types import Message, Prompt, Span, UserError, View

Change = tuple[float, int, int]  # a value for the characters [start, end)
Grown = tuple[str, bool]  # a text so far, and whether it is finished

_TAIL = 256  # how many characters at the end of a text are tokenised anew, at most about twice so many
_SURROGATE = re.compile("[\ud800-\udfff]")
# Where the tokens before do not change with what follows: before a space and a letter, between a letter and a stop.
_BORDER = re.compile(r"(?<=\S)(?= [^\W_])|(?<=[^\W_])(?=[\u3002\uff01\uff1f\uff0c\u3001\uff1b\uff1a])")


@dataclass
class Cut:
    """The tokens of one growing text: their ids and the characters they cover, which follow each other without a gap.

    Attributes:
        resume: a character and the number of tokens before it; the text's tokens from there on are those of the rest
            alone.
    """

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    resume: tuple[int, int] = (0, 0)


class Tokens:
    """A tokenizer, for texts that are read beside their prompt and while they grow."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer of {name} cannot tell which characters a token covers (it is no fast one); use another"
            )
        self.tokenizer, self.name = tokenizer, name
        plain, full = self._encode(["x"])[0][0], tokenizer("x")["input_ids"]
        self._leading: list[int] = full[: full.index(plain[0])] if plain and plain[0] in full else []
        first = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self._first = next((one for one in first if one is not None), None)
        self._anchor, self._anchor_ids = self._anchored(plain)

    def _anchored(self, plain: list[int]) -> tuple[str, list[int]]:
        """What to put before a text that goes on from a prompt, and its tokens; nothing for most tokenizers.

        Some put a space before any text. So that they put none there, the text is tokenised behind a mark, whose tokens
        are then taken away.
        """
        for mark in ("\n", ".", ","):
            (ids, _), (both, _) = self._encode([mark, f"{mark}x"])
            unknown = self.tokenizer.unk_token_id
            if ids and (unknown is None or unknown not in ids) and both[: len(ids)] == ids and len(both) > len(ids):
                return ("", []) if both[len(ids) :] == plain else (mark, ids)
        return "", []

    def of_prompt(self, prompt: Prompt, seen: bool = True) -> list[int]:
        """The tokens that come before the text: at least one, so that the text's first token follows something.

        Messages go through the tokenizer's own chat template; where it has none, as ``plain_text``.
        """
        if seen and (chat := self.chat(prompt)) is not None:
            ids = self._encode([chat])[0][0]
        elif seen:
            ids = [*self._leading, *self._encode([plain_text(prompt)])[0][0]]
        else:
            ids = self._leading
        if ids:
            return ids
        if self._first is None:
            raise UserError(
                f"the tokenizer of {self.name} has no token that an empty prompt could begin with; give a prompt"
            )
        return [self._first]

    def chat(self, prompt: Prompt, reply: str | None = None) -> str | None:
        """Messages as the chat template has them, up to where the reply begins, or with the whole ``reply``.

        None where the prompt has no messages or the tokenizer no template.
        """
        if prompt.messages is None or not self.tokenizer.chat_template:
            return None
        said = [{**message, "content": clean(message["content"])} for message in prompt.messages]
        if reply is not None:
            said.append({"role": "assistant", "content": clean(reply)})
        rendered: str = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=reply is None)
        return rendered

    def ids_of(self, text: str) -> list[int]:
        """The tokens of a text that goes on from another one, without special ones."""
        return self._cut([text])[0][0]

    def grow(self, cuts: Sequence[Cut], grown: Sequence[Grown]) -> list[int]:
        """Brings the cuts to the texts so far; how many tokens of each are as they were."""
        # At the end all is tokenised once more, so that the tokens are those of the finished text in any case.
        begins = [(0, 0) if done else cut.resume for cut, (_, done) in zip(cuts, grown, strict=True)]
        found = self._cut([text[start:] for (start, _), (text, _) in zip(begins, grown, strict=True)])
        kept = []
        for cut, (text, done), (start, before), (ids, offsets) in zip(cuts, grown, begins, found, strict=True):
            same = before + common(cut.ids[before:], ids)
            del cut.ids[same:], cut.spans[same:]
            cut.ids += ids[same - before :]
            self._cover(cut, [(start + a, start + b) for a, b in offsets[same - before :]], len(text))
            kept.append(same)
            if not done and len(text) - cut.resume[0] > 2 * _TAIL:
                self._move(cut, text)
        return kept

    def _move(self, cut: Cut, text: str) -> None:
        """A new place to tokenise from, if the tokens from there on are the same when they stand alone."""
        for match in list(_BORDER.finditer(text, cut.resume[0] + 1, len(text) - _TAIL))[-1:]:
            place = match.start()
            before = next((i for i, (start, _) in enumerate(cut.spans) if start >= place), len(cut.ids))
            whole = before < len(cut.spans) and cut.spans[before][0] == place
            if whole and self._cut([text[place:]])[0][0] == cut.ids[before:]:
                cut.resume = (place, before)

    @staticmethod
    def _cover(cut: Cut, offsets: Sequence[tuple[int, int]], length: int) -> None:
        """Appends the characters of tokens: from where the last one ended (a space may be left out) to their end."""
        for start, end in offsets:
            last = cut.spans[-1][1] if cut.spans else 0
            begin, stop = min(start, last), min(max(end, last), length)
            if begin >= stop:  # it has no characters of its own: it goes with the one before it
                begin = max(0, stop - 1)
                stop = begin + 1
            cut.spans.append((begin, stop))

    def _cut(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """The tokens of texts that go on from others, and their characters."""
        if not self._anchor:
            return self._encode(texts)
        found, count = self._encode([self._anchor + text for text in texts]), len(self._anchor_ids)
        for i, (ids, offsets) in enumerate(found):
            if ids[:count] == self._anchor_ids and offsets[count - 1][1] <= 1:
                found[i] = ids[count:], [(max(0, a - 1), max(0, b - 1)) for a, b in offsets[count:]]
            else:  # the text's first character joined the mark
                found[i] = self._encode([texts[i]])[0]
        return found

    def _encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        made = self.tokenizer(
            [clean(text) for text in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(zip(made["input_ids"], made["offset_mapping"], strict=True))


@dataclass
class Reading:
    """The state of one text at one model: its prompt's tokens, its own, what each of these was paid, what was read."""

    prompt: list[int]
    memory: Memory
    cut: Cut = field(default_factory=Cut)
    paid: list[Change] = field(default_factory=list)

    def reaching(self, start: int) -> list[float]:
        """The values of the tokens that reach beyond the character ``start``."""
        first = len(self.paid)
        while first and self.paid[first - 1][2] > start:
            first -= 1
        return [value for value, _, _ in self.paid[first:]]


class TokenScorer:
    """A value for each token of growing texts.

    Args:
        measure: makes the values of the model's outputs, see ``Frozen.read``.
        logits: whether these outputs are logits, or hidden states.
        before: whether a token's value is made of the output before it (how likely it was), or of the one after it.
        see_prompt: whether the model reads the prompt before the text.
    """

    def __init__(
        self, frozen: Frozen, measure: Measure, *, logits: bool, before: bool, see_prompt: bool = True
    ) -> None:
        if not isinstance(see_prompt, bool):
            raise UserError(f"see_prompt={see_prompt!r} must be true or false")
        if not frozen.causal:
            raise UserError(
                f"the model {frozen.name} reads in both directions, so that a token's value would change with what "
                "follows; use one that reads from left to right"
            )
        self.frozen, self.measure, self.logits, self.see_prompt = frozen, measure, logits, see_prompt
        self.tokens = Tokens(frozen.tokenizer, frozen.name)
        self._lag = 1 if before else 0

    def start(self, prompt: Prompt) -> Reading:
        """The state of a text that has just begun."""
        ids = self.tokens.of_prompt(prompt, self.see_prompt)
        return Reading(ids, self.frozen.memory(ids[:-1]))

    def advance(self, readings: Sequence[Reading], grown: Sequence[Grown]) -> list[list[Change]]:
        """Reads on; what each text has to be paid: its new tokens, and those that are gone with the sign turned."""
        kept = self.tokens.grow([reading.cut for reading in readings], grown)
        changes, jobs = [], []
        for reading, old in zip(readings, kept, strict=True):
            changes.append([(-value, start, end) for value, start, end in reading.paid[old:]])
            del reading.paid[old:]
            first = len(reading.prompt) - self._lag
            ids = reading.prompt + reading.cut.ids
            jobs.append(Job(reading.memory, ids, first + old, first + len(reading.cut.ids)))
        values = self.frozen.read(jobs, self.measure, self.logits)
        for reading, old, made, change in zip(readings, kept, values, changes, strict=True):
            spans = reading.cut.spans[old:]
            new = [(value, start, end) for value, (start, end) in zip(made.tolist(), spans, strict=True)]
            reading.paid += new
            change += new
        return changes


class TokenReward:
    """What rewards share that pay every token of a model's tokenizer: the state, and how values become spans.

    Args:
        scorers: whose values are added up, each with its sign.
        mean: pay each piece one number, the mean over the tokens that reach into it, in place of a span for each token.
    """

    every: Any = "word"
    batched = True
    name = "token_reward"
    stops = False

    def __init__(self, scorers: Sequence[tuple[TokenScorer, float]], mean: bool) -> None:
        if not isinstance(mean, bool):
            raise UserError(f"{self.name}: mean={mean!r} must be true or false")
        self.scorers, self.mean = list(scorers), mean

    def start(self, prompt: Prompt) -> list[Reading]:
        """The state of a text that has just begun."""
        return [scorer.start(prompt) for scorer, _ in self.scorers]

    def extend(self, states: Sequence[list[Reading]], views: Sequence[View]) -> list[Any]:
        """What each text's newest piece is paid: spans, or with ``mean`` a number; None where it has no token."""
        grown = [(view.text, view.done) for view in views]
        changes: list[list[Change]] = [[] for _ in views]
        for index, (scorer, sign) in enumerate(self.scorers):
            found = scorer.advance([state[index] for state in states], grown)
            for change, added in zip(changes, found, strict=True):
                change += [(sign * value, start, end) for value, start, end in added]
        if not self.mean:
            return [merged(change) for change in changes]
        return [self._mean(state, len(view.text) - len(view.piece)) for state, view in zip(states, views, strict=True)]

    def score(self, text: str, prompt: str | list[Message] = "") -> float:
        """What a finished text is paid in all; with ``mean``, the mean over its tokens (0 where it has none)."""
        made = as_prompt(prompt)
        (paid,) = self.extend([self.start(made)], [View(text, text, made, made.info, done=True)])
        return (paid or 0.0) if self.mean else sum(span.value for span in paid)

    def _mean(self, state: Sequence[Reading], start: int) -> float | None:
        values = [reading.reaching(start) for reading in state]
        if not values[0]:
            return None
        total = sum(sign * sum(some) for (_, sign), some in zip(self.scorers, values, strict=True))
        return total / len(values[0])


def merged(changes: Sequence[Change]) -> list[Span]:
    """Spans in order; those that overlap become one with the sum of their values."""
    spans: list[Change] = []
    for value, start, end in sorted(changes, key=lambda change: change[1]):
        if spans and start < spans[-1][2]:
            before, first, last = spans[-1]
            spans[-1] = (before + value, first, max(last, end))
        else:
            spans.append((value, start, end))
    return [Span(*span) for span in spans]


def as_prompt(prompt: str | list[Message]) -> Prompt:
    """A prompt for scoring a text on its own."""
    messages = None if isinstance(prompt, str) else prompt
    return Prompt("text", prompt if isinstance(prompt, str) else "", [], messages=messages)


def plain_text(prompt: Prompt) -> str:
    """The prompt for a model that knows no chat template: the text itself, or what the messages say, in paragraphs."""
    if prompt.messages is None:
        return prompt.text
    return "".join(f"{message['content']}\n\n" for message in prompt.messages)


def clean(text: str) -> str:
    """The text with every lone surrogate, which no tokenizer takes, as one replacement character."""
    return _SURROGATE.sub("\ufffd", text)
