"""The watcher: it reads tokens as they are sampled, asks the rewards about each new piece and hands back marks.

Any engine feeds the same watcher, token by token or in chunks; replaying a finished text goes through the same code,
so live marks and replayed marks are equal. Batched rewards see all rows of one call together.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

from instant_reward.rewards.base import Reward, as_rewards
from instant_reward.text import Decoder, Pieces, TextStream, token_range
from instant_reward.types import Mark, Prompt, RewardError, Rollout, Span, Stop, UserError, View


@runtime_checkable
class DraftStream(TextStream, Protocol):
    """A text that an action may change in its middle: all of its characters are held back until it is flushed.

    Attributes:
        draft: the whole text as it stands.
    """

    draft: str


@dataclass
class _Cursor:
    """How far one way of cutting pieces has come: the next piece begins at this character and this token."""

    character: int = 0
    token: int = 0


@dataclass
class _Row:
    prompt: Prompt
    stream: TextStream | None
    cursors: list[_Cursor]
    states: list[Any]
    char_ends: list[int]
    sampled: list[int]  # how many tokens the policy sampled, up to and with each token: others may have written some
    text: str = ""
    drafts: list[str] | None = None  # of a text that is changed in its middle: all of it, after each token
    marks: list[Mark] = field(default_factory=list)
    stopped_by: set[int] = field(default_factory=set)
    finished: bool = False

    def count(self, upto: int | None = None) -> int:
        """How many of the first ``upto`` tokens (of all) the policy sampled."""
        index = len(self.sampled) if upto is None else upto
        return self.sampled[index - 1] if index else 0


@dataclass(frozen=True)
class _Piece:
    row: _Row
    view: View
    start: int
    end: int
    seen: int


class Watch:
    """Scores texts while they are written.

    Args:
        rewards: anything ``as_rewards`` takes.
        decoder: makes characters of what was sampled; None where the characters are handed over (replay).
        step: the training step, for error messages.

    Attributes:
        may_stop: whether one of the rewards may stop a text before its end.
    """

    def __init__(self, rewards: Sequence[Any], decoder: Decoder | None = None, step: int | None = None) -> None:
        self.rewards: list[Reward] = as_rewards(rewards)
        self.decoder = decoder
        self.step = step
        self._rows: dict[Any, _Row] = {}
        # Rewards that cut pieces in the same way share the cutting.
        self._ways: list[Pieces] = []
        self._way_of: list[int] = []
        keys: list[tuple[Any, Any]] = []
        for one in self.rewards:
            key = (one.every, one.segmenter)
            if key not in keys:
                keys.append(key)
                self._ways.append(Pieces(one.every, one.segmenter))
            self._way_of.append(keys.index(key))
        ways = zip(self.rewards, self._way_of, strict=True)
        self.may_stop = any(one.stops and not self._ways[way].whole for one, way in ways)

    def open(self, row: Any, prompt: Prompt) -> None:
        """Begins a text; ``row`` is the engine's own name for it."""
        self._open(row, prompt, self.decoder.stream(prompt) if self.decoder else None)

    def _open(self, row: Any, prompt: Prompt, stream: TextStream | None, redrawn: bool = False) -> None:
        """``open``; of a replay ``redrawn`` says that the text has drafts."""
        first = len(prompt.token_ids)
        redrawn = redrawn or isinstance(stream, DraftStream)
        if redrawn:
            self._check_redrawn(prompt)
        self._rows[row] = _Row(
            prompt=prompt,
            stream=stream,
            drafts=[] if redrawn else None,
            cursors=[_Cursor(0, first) for _ in self._ways],
            states=[self._start(one, prompt) for one in self.rewards],
            char_ends=[0] * first,
            sampled=[0] * first,
        )

    def feed(self, row: Any, token_ids: Sequence[int], done: bool) -> tuple[list[Mark], int | None]:
        """Reads newly sampled tokens of one text.

        Args:
            done: whether the text ends with the last of them.

        Returns:
            The new marks, and where a reward stopped the text: its length in tokens, prompt included, or None.
        """
        return self.feed_many([(row, token_ids, done)])[0]

    def feed_many(self, items: Sequence[tuple[Any, Sequence[int], bool]]) -> list[tuple[list[Mark], int | None]]:
        """``feed`` for several texts at once, so that batched rewards are asked once."""
        rows = [self._rows.get(row) for row, _, _ in items]  # a row that was closed after a stop may still be fed
        before = [len(row.marks) if row else 0 for row in rows]
        for position in range(max((len(tokens) for _, tokens, _ in items), default=0)):
            ready = []
            for row, (_, tokens, done) in zip(rows, items, strict=True):
                if row and position < len(tokens) and not row.finished:
                    last = done and position == len(tokens) - 1
                    ready.append((row, self._characters(row, tokens[position], last), last))
            self._advance(ready)
        return [
            (row.marks[count:], len(row.char_ends) if row.stopped_by else None) if row else ([], None)
            for row, count in zip(rows, before, strict=True)
        ]

    def drafts(self, row: Any) -> list[str] | None:
        """Of a text that is not closed yet: ``Rollout.drafts``."""
        return self._rows[row].drafts

    def close(self, row: Any) -> tuple[str, list[int], list[Mark]]:
        """Forgets a text; returns its characters, ``char_ends`` ``[L]`` and marks."""
        closed = self._rows.pop(row)
        return closed.text, closed.char_ends, closed.marks

    def rate_finished(self, rollouts: Sequence[Rollout]) -> list[list[Mark]]:
        """The marks of whole texts whose pieces all end with them; rewards see all the texts in one call."""
        for number, rollout in enumerate(rollouts):
            self.open(number, rollout.prompt)
            row = self._rows[number]
            row.text, row.char_ends = rollout.text, list(rollout.char_ends)
            row.sampled = list(itertools.accumulate(rollout.mask))
        self._rate([(self._rows[number], True) for number in range(len(rollouts))])
        return [self.close(number)[2] for number in range(len(rollouts))]

    def _start(self, one: Reward, prompt: Prompt) -> Any:
        try:
            return one.start(prompt)
        except Exception as error:
            raise self._wrong(one, prompt, f"raised {type(error).__name__} in start: {error}") from error

    def _check_redrawn(self, prompt: Prompt) -> None:
        """Refuses rewards that remember how far they have read a text that may be changed before that."""
        for one, way in zip(self.rewards, self._way_of, strict=True):
            remembers = one.takes == "state" and not getattr(one.function, "rereads", False)
            if remembers and self._ways[way].by_tokens is not None:
                raise self._wrong(
                    one, prompt, "reads a text that only grows, and here each action may change its middle; use "
                    "every='end', or give the score to ir.change"
                )  # fmt: skip

    @staticmethod
    def _characters(row: _Row, token_id: int, last: bool) -> str:
        assert row.stream is not None, "a watch without a decoder replays; it is fed by `replay`"
        characters = row.stream.push(token_id)
        if row.drafts is not None:
            row.drafts.append(cast(DraftStream, row.stream).draft)
            return ""  # they are certain when the text ends
        return characters + row.stream.flush() if last else characters

    def _advance(self, ready: Sequence[tuple[_Row, str, bool]], own: bool = True) -> None:
        """One more token for each row: cut pieces, ask the rewards, and close rows that a reward stopped.

        Args:
            own: whether the policy sampled it; else another speaker wrote it.
        """
        for row, characters, _ in ready:
            row.text += characters
            row.char_ends.append(len(row.text))
            row.sampled.append(row.count() + own)
        self._rate([(row, last) for row, _, last in ready])
        stopped = [row for row, _, last in ready if row.stopped_by and not last]
        if stopped:  # the text ends here: the other rewards see their last pieces
            self._rate([(row, True) for row in stopped])
        for row, _, last in ready:
            row.finished = row.finished or last or bool(row.stopped_by)

    def _rate(self, rows: Sequence[tuple[_Row, bool]]) -> None:
        for row, done in rows:
            if done and row.drafts:
                row.text = row.drafts[-1]
                row.char_ends[-1] = len(row.text)
        cut = [[self._cut(row, way, done) for row, done in rows] for way in range(len(self._ways))]
        skip = [set(row.stopped_by) for row, _ in rows]  # who stopped a text is not asked about its rest
        for index, one in enumerate(self.rewards):
            pieces = [
                piece
                for by_row, (row, done), skipped in zip(cut[self._way_of[index]], rows, skip, strict=True)
                if index not in skipped
                for piece in by_row or ([self._ending(row, self._way_of[index])] if done and one.sees_end else [])
            ]
            if pieces:
                self._ask(index, one, pieces)

    def _cut(self, row: _Row, way: int, done: bool) -> list[_Piece]:
        """The pieces that ended with the newest token, for one way of cutting."""
        pieces, cursor, seen = self._ways[way], row.cursors[way], len(row.char_ends)
        first = len(row.prompt.token_ids)
        if pieces.whole:
            ends = [len(row.text)] if done else []
        elif pieces.by_tokens is not None:
            # A zero-width token may hold the first bytes of a character: a piece ends with whole characters only.
            grown = seen == first or row.char_ends[-1] > (row.char_ends[-2] if seen > 1 else 0)
            visible = grown or row.drafts is not None
            full = row.count() - row.count(cursor.token) >= pieces.by_tokens and visible
            ends = [len(row.text)] if full or (done and seen > cursor.token) else []
        else:
            ends = pieces.ends(row.text, cursor.character, done)
        result = []
        for number, end in enumerate(ends):
            final = done and number == len(ends) - 1
            start_token, end_token = cursor.token, seen
            if not (pieces.whole or pieces.by_tokens is not None):
                start_token, end_token = token_range(row.char_ends, first, cursor.character, end)
                end_token = seen if final else end_token
            text, piece = row.text[:end], row.text[cursor.character : end]
            if row.drafts and pieces.by_tokens is not None:
                text = piece = row.drafts[-1]
            view = View(
                text=text,
                piece=piece,
                prompt=row.prompt,
                info=row.prompt.info,
                done=final,
                tokens=end_token - start_token,
                sampled=row.count(),
            )
            result.append(_Piece(row, view, start_token, end_token, seen))
            cursor.character, cursor.token = end, end_token
        return result

    @staticmethod
    def _ending(row: _Row, way: int) -> _Piece:
        """An empty last piece, for a text that ends where its last piece had ended already."""
        seen = len(row.char_ends)
        start = min(row.cursors[way].token, seen - 1)
        view = View(row.text, "", row.prompt, row.prompt.info, done=True, tokens=seen - start, sampled=row.count())
        return _Piece(row, view, start, seen, seen)

    def _ask(self, index: int, one: Reward, pieces: Sequence[_Piece]) -> None:
        if one.batched and one.takes != "state":
            self._call(index, one, pieces)
        elif one.batched:  # two pieces of one text must not share a call: the second builds on the first one's state
            rounds: list[list[_Piece]] = []
            met: dict[int, int] = {}
            for piece in pieces:
                turn = met.get(id(piece.row), 0)
                met[id(piece.row)] = turn + 1
                if turn == len(rounds):
                    rounds.append([])
                rounds[turn].append(piece)
            for together in rounds:
                self._call(index, one, together)
        else:
            for piece in pieces:
                if index not in piece.row.stopped_by:
                    self._call(index, one, [piece])

    def _call(self, index: int, one: Reward, pieces: Sequence[_Piece]) -> None:
        try:
            values = one.rate([piece.view for piece in pieces], [piece.row.states[index] for piece in pieces])
        except RewardError:  # it names the prompt that failed itself
            raise
        except Exception as error:
            raise self._wrong(one, pieces[0].row.prompt, f"raised {type(error).__name__}: {error}") from error
        if not isinstance(values, list):
            message = (
                f"handed back a {type(values).__name__} for {len(pieces)} texts; return a list with one value for each"
            )
            raise self._wrong(one, pieces[0].row.prompt, message)
        if len(values) != len(pieces):
            message = f"handed back {len(values)} values for {len(pieces)} texts; return one for each"
            raise self._wrong(one, pieces[0].row.prompt, message)
        for piece, value in zip(pieces, values, strict=True):
            if index not in piece.row.stopped_by:
                self._place(index, one, piece, value)

    def _place(self, index: int, one: Reward, piece: _Piece, value: Any) -> None:
        row = piece.row
        if isinstance(value, Stop):
            if not one.stops:
                raise self._wrong(one, row.prompt, "stopped the text, though it says stops=False; leave that out")
            row.stopped_by.add(index)
            value = value.value
        if value is None:
            return
        if hasattr(value, "tolist"):  # an array or a tensor: one number, or one for each token
            value = value.tolist()
        if isinstance(value, Span):
            value = [value]
        if not isinstance(value, list | tuple):
            number = self._number(one, row.prompt, value)
            row.marks.append(Mark(number, piece.start, piece.end, one.name, piece.seen))
        elif value and all(isinstance(item, Span) for item in value):
            first = len(row.prompt.token_ids)
            for span in value:
                characters = self._characters_of(span, one, piece)
                # Who wrote which characters of a text that was changed in its middle is not known.
                known = row.drafts is None or piece.view.done
                start, end = token_range(row.char_ends, first, *characters) if known else (piece.start, piece.end)
                number = self._number(one, row.prompt, span.value)
                row.marks.append(Mark(number, start, end, one.name, piece.seen))
        elif value:
            if len(value) != piece.end - piece.start:
                tokens = piece.end - piece.start
                message = f"gave a list of {len(value)} values for a piece of {tokens} tokens; give one for each token"
                raise self._wrong(one, row.prompt, message)
            for offset, item in enumerate(value):
                number = self._number(one, row.prompt, item)
                row.marks.append(Mark(number, piece.start + offset, piece.start + offset + 1, one.name, piece.seen))

    def _characters_of(self, span: Span, one: Reward, piece: _Piece) -> tuple[int, int]:
        """A span's first character and the one behind its last, checked."""
        limit = len(piece.view.text)
        try:
            start, end = operator.index(span.start), operator.index(span.end)
        except TypeError:
            start = end = -1
        if 0 <= start < end <= limit:
            return start, end
        message = (
            f"gave the span [{span.start}, {span.end}); it must hold characters of the text, between 0 and {limit}"
        )
        raise self._wrong(one, piece.row.prompt, message)

    def _number(self, one: Reward, prompt: Prompt, value: Any) -> float:
        if isinstance(value, str | bytes):
            raise self._wrong(one, prompt, f"gave the text {value[:40]!r}; return a number")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            message = f"gave a {type(value).__name__}; return a number, a list, a span, ir.stop(value) or None"
            raise self._wrong(one, prompt, message) from error
        if not math.isfinite(number):
            raise self._wrong(
                one, prompt, f"gave {number}; return a finite number, or None where it has nothing to say"
            )
        return number

    def _wrong(self, one: Reward, prompt: Prompt, message: str) -> RewardError:
        where = f"prompt {prompt.id} ({prompt.text[:40]!r})"
        when = "" if self.step is None else f" at step {self.step}"
        return RewardError(f"reward '{one.name}' on {where}{when} {message}")


def replay(rewards: Sequence[Any], rollout: Rollout) -> list[Mark]:
    """Scores a finished rollout again, exactly as live scoring saw it.

    Returns:
        The marks that a live watch with these rewards would have made.

    Raises:
        UserError: where a reward compares siblings, which one text does not have.
    """
    return replay_to_stop(rewards, rollout)[0]


def replay_to_stop(rewards: Sequence[Any], rollout: Rollout) -> tuple[list[Mark], int | None]:
    """``replay``, and the length in tokens at which a reward stops the text, if one does."""
    watch = Watch(rewards)
    siblings = next((one.name for one in watch.rewards if one.scope == "group"), None)
    if siblings is not None:
        raise UserError(f"reward '{siblings}' compares siblings; score all of them together with ir.replay_groups")
    watch._open(0, rollout.prompt, None, rollout.drafts is not None)
    row = watch._rows[0]
    count = len(rollout.token_ids)
    for index in range(rollout.start, count):
        before = rollout.char_ends[index - 1] if index > rollout.start else 0
        last = index == count - 1 and (rollout.stop != "stopped" or rollout.at_limit)
        characters = rollout.text[before : rollout.char_ends[index]]
        if row.drafts is not None and rollout.drafts is not None:
            row.drafts.append(rollout.drafts[index - rollout.start])
            characters = ""
        watch._advance([(row, characters, last)], bool(rollout.mask[index]))
        if row.stopped_by:
            break
    if not row.finished:  # another reward stopped this text: these see their last pieces where it was cut
        watch._rate([(row, True)])
    stopped = len(row.char_ends) if row.stopped_by else None
    return watch.close(0)[2], stopped
