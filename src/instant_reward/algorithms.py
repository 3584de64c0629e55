"""The named choices of (credit, loss). None is a trainer: the loop is the same for all of them.

A preset is plain data (``presets.py``); a config may override its fields. What it cannot take as it comes is refused
(``checks.py``), with the name of the option that allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from instant_reward.batch import Batch
from instant_reward.carried import adapt
from instant_reward.checks import check, check_sources, discount_of, shapes
from instant_reward.config_algorithm import AlgorithmConfig, ImportanceConfig
from instant_reward.credit import Source
from instant_reward.crediting import ENTROPY, KL, LENGTH, TEACHER, credit_batch
from instant_reward.objective import objective
from instant_reward.presets import PRESETS as PRESETS
from instant_reward.presets import Preset, preset_of
from instant_reward.rewards.base import Reward
from instant_reward.types import Carried, CriticNeed, LossOutput, Needs, PolicyOutput, TeacherNeed, UserError


@dataclass(frozen=True)
class Algorithm:
    """Pure functions, and what they need of the policy.

    Attributes:
        credit: fills in advantages: ``credit(batch) -> batch``.
        loss: of a part: ``loss(output, part) -> LossOutput``.
        adapt: what is carried to the next step: ``adapt(batch, metrics of the step) -> Carried``.
        sources: the rewards that are learned from, and the dense ones of the algorithm's own after them.
        needs: what the policy has to hand over.
        preset: the choices it was built from.
    """

    credit: Callable[[Batch], Batch]
    loss: Callable[[PolicyOutput, Batch], LossOutput]
    adapt: Callable[[Batch, dict[str, float]], Carried]
    sources: list[Source]
    needs: Needs
    preset: Preset


def build(config: AlgorithmConfig, rewards: Sequence[Reward], max_new_tokens: int) -> Algorithm:
    """The algorithm a config names, for these rewards.

    Raises:
        UserError: where the preset would lose a reward's timing or bias it, and no option allows that; where an option
            would do nothing, or does not go with another.
    """
    preset = preset_of(config)
    decoupled = preset.ratio == "decoupled" and preset.loss == "clipped"
    if decoupled and config.importance is None:  # without weights it would be half of what it is
        config = config.model_copy(update={"importance": ImportanceConfig()})
    if preset.loss == "doubly_robust" and config.importance is None:
        config = config.model_copy(update={"importance": ImportanceConfig(level="sequence", most=None)})
    learned = [one for one in rewards if one.train]
    check(config, preset, learned)
    sources = [
        # A potential is paid back with the end of the text, however it ends: nothing of it is left beyond.
        Source(
            one.name,
            one.weight,
            discount_of(config, one),
            one.at,
            final=one.every == "end" or shapes(one),
            earned=not shapes(one),
            rule=one.rule,
            scaled=one.scaled,
            clip=one.clip,
        )
        for one in learned
    ]
    if config.kl and config.kl_as == "reward":
        sources.append(Source(KL, config.kl, dense="kl"))
    if config.entropy and config.entropy_as == "reward":
        sources.append(Source(ENTROPY, config.entropy, dense="entropy"))
    if config.teacher and not config.teacher.whole:
        sources.append(Source(TEACHER, config.teacher.weight, config.teacher.discount, dense="teacher"))
    if config.soft_length:
        sources.append(Source(LENGTH, final=True, dense="length"))
    check_sources(config, preset, sources, [one.name for one in rewards if not one.train])
    if config.soft_length and config.soft_length > max_new_tokens:
        raise UserError(
            f"algorithm.soft_length: {config.soft_length} is more than sampling.max_new_tokens ({max_new_tokens}), so "
            "every text would be too long; lower it"
        )
    return Algorithm(
        credit=partial(credit_batch, preset=preset, config=config, longest=max_new_tokens),
        loss=partial(objective, preset=preset, config=config, constant=float(max_new_tokens)),
        adapt=partial(adapt, config=config, warming=config.critic.warmup if preset.critic else 0),
        sources=sources,
        needs=needs(config, preset, len(sources), _go_on(sources, preset)),
        preset=preset,
    )


def _go_on(sources: Sequence[Source], preset: Preset) -> bool:
    """Whether more may be paid after a cut. One value of all sources cannot leave the final ones out: then nothing."""
    together = all if preset.returns in ("q", "bellman") else any
    return together(not source.final for source in sources)


def needs(config: AlgorithmConfig, preset: Preset, sources: int, go_on: bool = True) -> Needs:
    """What a choice of credit and loss asks of a policy.

    Args:
        sources: how many reward sources there are.
        go_on: whether one of them could pay more after the end of a text that was cut off.
    """
    critic, teacher = None, config.teacher
    if preset.critic:
        tables = {"q": 1, "bellman": 2}.get(preset.returns, 0)
        critic = CriticNeed(
            model=config.critic.model,
            outputs=1 if tables else sources,
            tables=tables,
            detach=config.critic.detach,
            learning_rate=config.critic.learning_rate,
            beyond=config.critic.bootstrap and go_on and preset.baseline != "value",
            warmup=config.critic.warmup,
            target_rate=config.target_rate if preset.returns == "bellman" else 0.0,
        )
    return Needs(
        learns=preset.loss != "none",
        reference=config.kl > 0,
        proximal=preset.returns == "vtrace"
        or config.importance is not None
        or (preset.loss == "clipped" and preset.ratio in ("decoupled", "sequence")),
        own_error=config.by_error is not None,
        entropy=config.entropy > 0 and config.entropy_as == "loss",
        critic=critic,
        top_actions=config.top_actions if preset.loss in ("all_actions", "doubly_robust") else None,
        teacher=None if teacher is None else TeacherNeed(teacher.model, teacher.whole, teacher.baseline),
    )
