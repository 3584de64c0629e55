"""The words of the library (torch-free): what a prompt, a mark, a view, a rollout and an output of a policy are.

Index ``t`` always means token ``t`` of one flat sequence: the prompt, then the sampled tokens, in a row. A mask says
which tokens the policy sampled. Shapes: ``B`` rows, ``L`` tokens, ``K`` reward sources, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Message = dict[str, str]
Every = str | int | Callable[[str], "bool | int | None"]
StopReason = Literal["ended", "length", "stopped"]


class UserError(Exception):
    """Something the user can mend: one sentence that says what is wrong, where, and what to do."""


class RewardError(UserError):
    """A reward that failed; the sentence names the reward, the prompt and the step."""


class RunError(UserError):
    """The run itself failed, though nothing was wrong with what the user gave it (the command ends with 1, not 2)."""

    exit_code: ClassVar[int] = 1


@dataclass(frozen=True)
class Prompt:
    """What a text begins with. ``text`` is what the model reads (messages are rendered by the chat template).

    Attributes:
        token_ids: what the flat sequence begins with.
        context: what the policy reads besides the flat sequence: of an encoder, the tokens of its source; of a choice
            among sentences, theirs. Plain numbers, in lists. None where the flat sequence is all.
        where: its row's place in the data, for messages.
    """

    id: str
    text: str
    token_ids: list[int]
    messages: list[Message] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    context: list[Any] | None = None
    where: str = field(default="", compare=False, repr=False)

    @property
    def place(self) -> str:
        """Where its row stands, for messages."""
        return self.where or f"prompt {self.id}"


@dataclass(frozen=True, slots=True)
class Mark:
    """One reward: ``value`` for the tokens ``[start, end)`` of the flat sequence, given by ``source``.

    ``seen`` counts every token of the flat sequence that was read to fix the value, the one that showed that the piece
    had ended included: the mark may depend on the tokens ``[0, seen)`` and on no later one.
    """

    value: float
    start: int
    end: int
    source: str
    seen: int


@dataclass(frozen=True, slots=True)
class Span:
    """A value for the characters ``[start, end)`` of a view's text."""

    value: float
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Rates the newest piece with ``value`` and ends the text there."""

    value: float | None = None


@dataclass(frozen=True, slots=True)
class View:
    """The text so far, as a reward function sees it: it ends with the newest piece and cannot show the future.

    Attributes:
        text: the sampled characters so far, the newest piece included. Where an action changes a text in its middle
            (a masked model's fill): the whole text as it stands.
        piece: the newest piece (the last characters of ``text``); of such a text all of it, at every action.
        prompt: what the text continues.
        info: the data set's other columns.
        done: whether the text has ended with this piece.
        tokens: how many tokens the piece has (a list of values must have this many).
        sampled: how many sampled tokens were read to fix this view, the one that showed that the piece had ended
            included: the last of them is where the view's mark is paid (``at="seen"``).
    """

    text: str
    piece: str
    prompt: Prompt
    info: Mapping[str, Any]
    done: bool
    tokens: int = 1
    sampled: int = 1

    def span(self, value: float, start: int, end: int) -> Span:
        """A value for the characters ``[start, end)`` of ``text``."""
        return Span(value, start, end)


@dataclass
class Rollout:
    """One prompt with one sampled text: lists of length ``L`` over the flat sequence.

    Attributes:
        group: siblings (texts of one prompt, sampled together) share it.
        mask: True where the policy sampled the token.
        logprobs: the sampler's log-probabilities under the distribution it drew from; 0 where the mask is off.
        char_ends: how many characters of ``text`` are there after each token (0 over the prompt).
        text: the characters of the sampled tokens.
        versions: the policy version that sampled each token (-1 where the mask is off).
        stop: "ended" by the end token or a stop string, "length" when cut off, "stopped" by a reward.
        at_limit: its last token was the last one allowed, whatever ended it: rewards were told so while it was written.
        drafts: the whole text after each sampled action, where an action changes it in its middle; None where it only
            grows. No character is certain before the last action then: ``char_ends`` are 0 up to it.
        forbidden_end: for how many sampled tokens the end token was forbidden (``min_new_tokens``).
        reshaped: drawn from something else than the policy's softmax (top-k, top-p, guided), so that ratios to what
            ``logprobs`` say of it are no importance weights.
    """

    id: str
    group: int
    prompt: Prompt
    token_ids: list[int]
    mask: list[bool]
    logprobs: list[float]
    char_ends: list[int]
    text: str
    marks: list[Mark]
    versions: list[int]
    stop: StopReason
    temperature: float = 1.0
    forbidden_end: int = 0
    reshaped: bool = False
    at_limit: bool = False
    drafts: list[str] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> int:
        """The index of the first sampled token."""
        return len(self.prompt.token_ids)

    @property
    def context(self) -> list[Any] | None:
        """What the policy read besides the flat sequence."""
        return self.prompt.context

    def total(self, source: str | None = None) -> float:
        """The sum of the marks' values, of one source or of all."""
        return sum(mark.value for mark in self.marks if source is None or mark.source == source)


@dataclass(frozen=True)
class Carried:
    """What an algorithm carries from one step to the next: plain numbers, kept in checkpoints.

    Attributes:
        step: how many steps it has taken.
        kl, entropy: the coefficients as they are now, where they adapt; None before the first step.
        mean_return: the running mean of the returns, and ``mean_weight`` how much of it is known (0 to 1).
        weights: of sources whose weight follows a constraint, as they are now.
        deviations: the running deviation of what texts earn from each source, and ``metrics`` the running mean of the
            metrics that weights hang on; both over about ten steps.
    """

    step: int = 0
    kl: float | None = None
    entropy: float | None = None
    mean_return: float = 0.0
    mean_weight: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)
    deviations: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CriticNeed:
    """What kind of critic an algorithm asks a policy for.

    Attributes:
        model: "head" on the policy's own trunk, "copy" for a trunk of its own that begins as the policy's, or the name
            of another model with the same tokenizer.
        outputs: how many values each prefix has (one per reward source).
        tables: how many Q functions over the vocabulary it has beside them.
        detach: whether a head on the shared trunk sends no gradient into it.
        learning_rate: of its own optimizer group; None for the policy's.
        beyond: whether anything is expected after the end of a text that was cut off.
        warmup: for so many steps at first it learns alone, and a head on the policy's trunk sends no gradient into it.
        target_rate: how far the slow copy of its Q functions follows at each step; 0 for no slow copy.
    """

    model: str = "copy"
    outputs: int = 1
    tables: int = 0
    detach: bool = True
    learning_rate: float | None = None
    beyond: bool = True
    warmup: int = 0
    target_rate: float = 0.0


@dataclass(frozen=True)
class TeacherNeed:
    """A teacher for the policy's own texts.

    Attributes:
        model: another model; None for the policy as it was before training.
        whole: the KL to it over the whole vocabulary, with gradient.
        baseline: that KL at each prefix, without gradient.
    """

    model: str | None = None
    whole: bool = False
    baseline: bool = False


@dataclass(frozen=True)
class Needs:
    """What an algorithm asks of a policy besides log-probabilities.

    Attributes:
        learns: the policy itself has a loss; without, its log-probabilities need no gradient.
        reference: log-probabilities under the policy as it was before training.
        proximal: log-probabilities under the policy as it is when the step begins.
        entropy: the entropy with gradient.
        critic: values, or Q functions.
        top_actions: the sum over next tokens goes over so many of the likeliest ones; 0 for all of them, None for no
            such sum.
        teacher: log-probabilities under a teacher.
        own_error: the given texts' log-probabilities under the policy as it is when the step begins, by which their
            tokens weigh.
    """

    learns: bool = True
    reference: bool = False
    proximal: bool = False
    entropy: bool = False
    critic: CriticNeed | None = None
    top_actions: int | None = None
    teacher: TeacherNeed | None = None
    own_error: bool = False


@dataclass
class PolicyOutput:
    """What a policy says of a batch's sampled tokens; 0 where the mask is off.

    Attributes:
        logprobs: ``[B, L]``, with gradient.
        entropy: ``[B, L]`` in nats; with gradient only where it was asked for.
        values: ``[B, K, L]``, the critic's value before each token, with gradient into the critic.
        chosen: ``[B, N, L]``, each Q function's value of the token that was sampled, with gradient into the critic.
        spread: ``[B, N, L]``, the log-sum-exp of each Q function over the vocabulary, with gradient into the critic.
        expected: ``[B, L]``, the sum over next tokens of probability times advantage, with gradient into the policy.
        divergence: ``[B, L]``, the KL to the teacher over the whole vocabulary, with gradient.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None
    chosen: Tensor | None = None
    spread: Tensor | None = None
    expected: Tensor | None = None
    divergence: Tensor | None = None


@dataclass
class LossOutput:
    """A scalar ``loss`` with gradient, and ``metrics`` as plain numbers that add up over the parts of a batch."""

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Tokenizer(Protocol):
    """What the library asks of a tokenizer; transformers' tokenizers have it."""

    all_special_ids: list[int]

    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...

    def __len__(self) -> int: ...
