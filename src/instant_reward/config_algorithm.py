"""The part of the config that chooses how a policy learns. ``None`` stands for the preset's own choice."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from instant_reward.config_section import Count, Fraction, NotNegative, Positive, Section, Text, Whole
from instant_reward.config_weight import Planned, least

Name = Literal[
    "reinforce", "reinforce++", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "instant", "value", "a2c", "ppo",
    "qac", "doubly_robust", "vtrace", "decoupled_ppo", "rwr", "awr", "raft", "ilql", "distill", "likelihood",
]  # fmt: skip


class CriticConfig(Section):
    """What judges prefixes, for the presets that have a critic.

    Attributes:
        model: "copy" (a trunk of its own that begins as the policy's), "head" (on the policy's trunk), or another
            model's name or folder with the same tokenizer.
        table: "value" fits a value of each next token (Q over the vocabulary) in place of one of the prefix.
        detach: a head on the policy's trunk sends no gradient into it.
        lam: of the critic's own targets: 1 is Monte Carlo, 0 the one-step target.
        weight: of its squared error in the loss.
        clip: how far a value may move in a step before its error stops counting; None for no bound.
        learning_rate: of its own optimizer group; the policy's (``train.learning_rate``) when left out.
        warmup: steps at first in which it learns alone.
        bootstrap: expect more rewards beyond the end of a text that was cut off by its length (of a final score, none).
    """

    short = "model"
    model: Text = "copy"
    table: bool = False
    detach: bool = True
    lam: Annotated[float, Field(ge=0, le=1)] = 1.0
    weight: Positive = 0.5
    clip: Positive | None = None
    learning_rate: Positive | None = None
    warmup: Whole = 0
    bootstrap: bool = True


class ImportanceConfig(Section):
    """Weights for texts that an earlier policy sampled.

    Attributes:
        level: whose ratio: of the token, its piece (``algorithm.pieces``), the whole text ("sequence"), or "decision":
            each reward by the ratio of the text up to it.
        most: weights stay at or below this.
        beyond: "truncate" cuts larger weights to ``most``; "mask" drops tokens with a weight outside 1/most to most.
        self_normalised: divide the weights of whole texts by their mean over the batch, and take the weighted mean
            return away: the gradient of the self-normalised estimate.
    """

    short = "level"
    level: Literal["token", "piece", "sequence", "decision"] = "token"
    most: Positive | None = 2.0
    beyond: Literal["truncate", "mask"] = "truncate"
    self_normalised: bool = False

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.beyond == "mask" and (self.most is None or self.most <= 1):
            raise ValueError("most must be above 1 where beyond=mask; raise it")
        if self.beyond == "mask" and self.level == "decision":
            raise ValueError("beyond=mask has no meaning for level=decision; use truncate")
        if self.self_normalised and (self.level != "sequence" or self.beyond == "mask"):
            raise ValueError("self_normalised is of whole texts' weights; use level=sequence and beyond=truncate")
        return self


class TeacherConfig(Section):
    """Distillation on the policy's own texts: the teacher's log-ratio, paid at each token.

    Attributes:
        model: another model with the same tokenizer; without it, the policy as it was before training (which then has
            to see more, or there is nothing to learn).
        sees: what the teacher reads in place of the prompt: a template over the prompt ``{prompt}`` and the data's
            other columns, for instance "{prompt} (The answer is {answer}.)"; without it, the prompt.
        weight: of the log-ratio.
        discount: 0 credits each token with its own log-ratio only; 1 is the gradient of the whole text's KL.
        baseline: take away what the log-ratio is on average at each prefix (its KL): the same step in expectation,
            with less noise. With discount 0 alone.
        whole: learn from the KL over the whole vocabulary at each prefix, in the loss, not from sampled log-ratios.
    """

    short = "model"
    model: Text | None = None
    sees: Text | None = None
    weight: Positive = 1.0
    discount: Annotated[float, Field(ge=0, le=1)] = 0.0
    baseline: bool = False
    whole: bool = False

    @model_validator(mode="after")
    def _differs(self) -> Self:
        if self.model is None and self.sees is None:
            raise ValueError("give model (another model), sees (what the teacher reads), or both")
        if self.whole and (self.baseline or self.discount != 0):
            raise ValueError("whole is a loss, not a reward; leave out baseline and discount")
        if self.baseline and self.discount != 0:
            raise ValueError("baseline needs discount 0; later tokens' log-ratios have another mean. Leave one out")
        return self


class ErrorConfig(Section):
    """Target tokens weigh by how wrong the policy is about them as the step begins, p being its chance of the token.

    Attributes:
        first: "harder" weighs by ``(1 - p) ** strength``, the focal weight of Lin et al. (2017), "Focal loss for dense
            object detection", equation 4; "easier" by ``p ** strength``.
        strength: 0 for none; a number, or a schedule over the steps.
        normalised: divided by their mean over the step's target tokens, so that the learning rate keeps its meaning.
    """

    short = "first"
    first: Literal["harder", "easier"]
    strength: Planned = 1.0
    normalised: bool = True

    @model_validator(mode="after")
    def _not_negative(self) -> Self:
        if least(self.strength) < 0:
            raise ValueError("strength must be 0 or more; to turn it around, set first to the other word")
        return self


class AlgorithmConfig(Section):
    """A named choice of (credit, loss). What is None is the preset's own.

    Attributes:
        discount: per sampled token (or piece, where pieces are the actions), for every source without its own.
        baseline: what is taken away from the returns; "value" is the critic's value of the prefix.
        normalise: over what the loss is averaged.
        scale: divide advantages by the deviation of the group or the batch, "whiten" them (the mean too), or "none".
        ratio: in the clipped loss, of the token, its piece or the whole text.
        clip_low, clip_high: how far the ratio may push below and above 1.
        pieces: "word", "sentence" or "line": pieces are the actions, each with one advantage.
        timing: "ignore" lets a preset sum rewards over time; "keep" refuses.
        biased_placement: "allow" lets rewards be placed on their spans.
        biased_baseline: "allow" lets siblings be the baseline of rewards that compare siblings.
        lam: the policy's lambda, where there is a critic; ``lam_length`` alpha makes it 1 - 1 / (alpha * length).
        kl: the weight of the reference KL. ``kl_as`` "reward" pays it per token; "loss" adds an estimate to the loss.
        kl_estimator: k1 (the log-ratio, as a reward), k2 or k3 (as a loss).
        kl_target: nats per token that the weight adapts to; kl_horizon: in how many texts.
        reset_reference: after so many steps the reference becomes the policy as it then is.
        entropy: the weight of the entropy bonus; entropy_as: in the "loss" at each prefix, or a "reward" per token.
        entropy_target: nats per token that the weight adapts to.
        epochs: passes over each batch; minibatches: optimizer steps in each.
        stop_kl: no further optimizer step on a batch once the policy is so many nats per token from its sampler.
        skip_equal: groups whose texts all earned the same are left out and others sampled, ``refill`` times at most.
        soft_length: over so many tokens before the longest length a penalty grows to 1.
        keep: "raft" learns from so many texts of each group.
        beta: "awr" and "rwr" weigh texts by exp(advantage / beta), at most ``most_weight``.
        top_actions: "qac" sums over so many of the likeliest next tokens; 0 for all.
        expectile, cql, target_rate: of "ilql".
        unrated: "likelihood" weighs target tokens that no reward rates by this.
        by_error: "likelihood" weighs target tokens by the policy's own error, too.
    """

    short = "name"
    name: Name = "rloo"
    discount: Fraction = 1.0
    baseline: Literal["none", "running_mean", "batch_mean", "leave_one_out", "group_mean", "value"] | None = None
    normalise: Literal["text", "tokens", "constant", "text_mean"] | None = None
    scale: Literal["none", "group", "batch", "whiten"] | None = None
    loss: Literal["policy_gradient", "clipped", "cispo"] | None = None
    ratio: Literal["token", "piece", "sequence"] | None = None
    clip_low: Annotated[float, Field(gt=0, le=1)] | None = None
    clip_high: Positive | None = None
    pieces: Literal["word", "sentence", "line"] | None = None
    timing: Literal["keep", "ignore"] = "keep"
    biased_placement: Literal["refuse", "allow"] = "refuse"
    biased_baseline: Literal["refuse", "allow"] = "refuse"
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    lam_length: Positive | None = None
    kl: NotNegative = 0.0
    kl_as: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target: Positive | None = None
    kl_horizon: Count = 10000
    reset_reference: Count | None = None
    entropy: NotNegative = 0.0
    entropy_as: Literal["loss", "reward"] = "loss"
    entropy_target: Positive | None = None
    epochs: Count = 1
    minibatches: Count = 1
    stop_kl: Positive | None = None
    critic: CriticConfig = CriticConfig()
    importance: ImportanceConfig | None = None
    teacher: TeacherConfig | None = None
    skip_equal: bool | None = None
    refill: Whole = 3
    soft_length: Count | None = None
    keep: Count = 1
    beta: Positive = 1.0
    most_weight: Positive = 20.0
    top_actions: Whole = 0
    expectile: Annotated[float, Field(gt=0.5, lt=1)] = 0.7
    cql: NotNegative = 0.01
    target_rate: Fraction = 0.005
    unrated: NotNegative = 1.0
    by_error: ErrorConfig | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        wants: list[tuple[bool, str]] = [
            (
                self.ratio == "piece" and self.pieces is None,
                "ratio=piece needs pieces; set pieces to word, sentence or line",
            ),
            (
                self.kl_target is not None and not self.kl,
                "kl_target adapts the weight kl; set kl above 0 to begin with",
            ),
            (
                self.entropy_target is not None and not self.entropy,
                "entropy_target adapts the weight entropy; set entropy above 0 to begin with",
            ),
            (
                self.reset_reference is not None and not self.kl,
                "reset_reference needs a reference; set kl above 0, or leave it out",
            ),
            (
                self.reset_reference is not None and self.teacher is not None and self.teacher.model is None,
                "reset_reference would move the teacher along, which is the policy as it was; leave one of them out",
            ),
            (
                self.lam_length is not None and "lam" in self.model_fields_set and self.lam != 0.95,
                "lam_length sets the policy's lambda by the length; leave out lam",
            ),
            (
                self.importance is not None and self.importance.level == "piece" and self.pieces is None,
                "importance.level=piece needs pieces; set pieces to word, sentence or line",
            ),
        ]
        found = [sentence for wrong, sentence in wants if wrong]
        if found:
            raise ValueError("; and ".join(found))
        return self

    def chosen(self, key: str, own: Any) -> Any:
        """What the config says, or the preset's ``own``."""
        value = getattr(self, key)
        return own if value is None else value
