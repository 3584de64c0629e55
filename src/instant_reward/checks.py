"""What an algorithm cannot take as it comes: rewards whose timing it would lose, placements that bias, idle options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from instant_reward import losses
from instant_reward.config_algorithm import AlgorithmConfig
from instant_reward.config_problems import report
from instant_reward.credit import Source
from instant_reward.crediting import ENTROPY, KL, LENGTH, TEACHER
from instant_reward.presets import PRESETS, Preset, unused
from instant_reward.rewards.base import Reward
from instant_reward.rewards.shaping import Shaping
from instant_reward.types import UserError

DENSE = (KL, TEACHER, LENGTH)


def check(config: AlgorithmConfig, preset: Preset, rewards: Sequence[Reward]) -> None:
    """Refuses rewards whose timing or discount would be lost silently, placements that bias, options without effect.

    Raises:
        UserError: names the rewards and the option that allows it.
    """
    wrong = [
        *_wrong_options(config, preset),
        *_wrong_shaping(config, preset, rewards),
        *_wrong_siblings(config, preset, rewards),
        *_wrong_pairs(config, preset, rewards),
        *_wrong_weights(rewards),
        *_wrong_credit(config, preset, rewards),
    ]
    if len(wrong) == 1:
        raise UserError(wrong[0])
    if wrong:
        raise report("the algorithm", wrong)


def _wrong_credit(config: AlgorithmConfig, preset: Preset, rewards: Sequence[Reward]) -> Iterator[str]:
    """What would be lost or biased by where the rewards are credited."""
    if preset.returns == "whole":  # summed over the text, a reward counts the same wherever it is paid
        if config.timing == "keep":
            yield from _wrong_timing(config, rewards)
        return
    if preset.loss == "likelihood":  # each token weighs what rates it, whenever that was known
        yield from _wrong_targets(config, rewards)
        return
    if preset.returns == "own":  # each piece is credited with its own rewards by definition
        if config.timing == "keep":
            yield from _wrong_own(config, rewards)
        return
    spans = [f"'{one.name}'" for one in rewards if one.at == "span"]
    if config.pieces and any(one.at == "span" and discount_of(config, one) < 1 for one in rewards):
        yield (
            f"rewards: {', '.join(spans)} paid at=span with a discount below 1 would count more than once where pieces "
            "are the actions; use at=seen, discount 1, or leave algorithm.pieces out"
        )
    if spans and config.biased_placement == "refuse":
        yield (
            f"rewards: {', '.join(spans)} paid at=span gets no credit for tokens outside its piece that it depends on, "
            "which biases the gradient; use at=seen, or allow it with algorithm.biased_placement=allow"
        )


def _wrong_pairs(config: AlgorithmConfig, preset: Preset, rewards: Sequence[Reward]) -> Iterator[str]:
    pairs = [f"'{one.name}'" for one in rewards if one.takes == "pair"]
    if pairs and preset.loss != "likelihood":
        yield (
            f"rewards: {', '.join(pairs)} compares a given text with what the policy would have written, and "
            f"{config.name} samples texts; use likelihood, or write it as f(text) or f(prompts, completions, **columns)"
        )
    cut = [f"'{one.name}'" for one in rewards if one.takes == "pair" and one.every != "end"]
    if cut:
        yield f"rewards: {', '.join(cut)} compares whole texts, which a piece of one is not; leave every out"


def _wrong_siblings(config: AlgorithmConfig, preset: Preset, rewards: Sequence[Reward]) -> Iterator[str]:
    """The siblings' returns are a baseline only while a text has no hand in them."""
    compared = [f"'{one.name}'" for one in rewards if one.scope == "group"]
    siblings = preset.weigh != "best" and (preset.baseline in ("leave_one_out", "group_mean"))
    if compared and siblings and config.biased_baseline == "refuse":
        yield (
            f"rewards: {', '.join(compared)} compares siblings, so what they earn hangs on the text itself, and as its "
            f"baseline ({preset.baseline}) it biases the gradient; use algorithm.baseline running_mean or value, or "
            "allow it with algorithm.biased_baseline=allow"
        )


def _wrong_weights(rewards: Sequence[Reward]) -> Iterator[str]:
    names = [one.name for one in rewards if not shapes(one)]  # of shaping, a text earns nothing in all
    for one in rewards:
        to = getattr(one.rule, "to", None)
        if to is None:
            continue
        if to not in names or to == one.name:
            others = ", ".join(name for name in names if name != one.name) or "none"
            yield (
                f"rewards: the weight of '{one.name}' follows the source {to!r}, which is not another one that is "
                f"learned from (there: {others}); name one of those"
            )
        if one.scaled or shapes(one):
            why = "is scaled, which divides it by its deviation already" if one.scaled else "is shaping, which has none"
            yield (
                f"rewards: the weight of '{one.name}' equalises its deviation, and '{one.name}' {why}; leave one out"
            )


def _wrong_shaping(config: AlgorithmConfig, preset: Preset, rewards: Sequence[Reward]) -> Iterator[str]:
    """A potential cancels only under the reward-to-go that it was made for, or in a plain sum."""
    for one in rewards:
        if not shapes(one):
            continue
        if preset.returns == "own":
            yield (
                f"rewards: '{one.name}' is shaping, which later payments take back; {config.name} credits each piece "
                "with its own alone, so it would bias the gradient: use reinforce, rloo or a2c"
            )
        if one.discount != 1.0 and preset.returns == "whole":
            yield (
                f"rewards: '{one.name}' is shaped for a discount of {one.discount}, and {config.name} sums rewards "
                "undiscounted, so it would bias the gradient; give ir.potential discount 1, or use reinforce or rloo"
            )
        if one.discount != 1.0 and config.pieces:
            yield (
                f"rewards: '{one.name}' is shaped for a discount of {one.discount} per token, and algorithm.pieces "
                "discounts by pieces, so it would bias the gradient; give ir.potential discount 1, or leave pieces out"
            )


def shapes(one: Reward) -> bool:
    """Whether a reward only moves what others pay: a potential."""
    return isinstance(one, Shaping)


def _wrong_options(config: AlgorithmConfig, preset: Preset) -> Iterator[str]:
    if config.kl_as == "loss" and config.kl_estimator == "k1":
        yield losses.KL_AS_LOSS
    if config.kl_as == "reward" and config.kl_estimator != "k1":
        yield (
            f"algorithm.kl_estimator: {config.kl_estimator} paid as a reward has another gradient than the KL; "
            "use k1, or set algorithm.kl_as to 'loss'"
        )
    if preset.loss == "clipped" and preset.clip_low >= 1:
        yield f"algorithm.clip_low: {preset.clip_low} is no bound on a ratio; set it below 1"
    if (config.loss is not None) and PRESETS[config.name].loss not in ("policy_gradient", "clipped", "cispo"):
        yield f"algorithm.loss: {config.name} has a loss of its own; leave the option out"
    if config.critic.table and preset.loss != "none":
        yield (f"algorithm.critic.table: {config.name} has the critic that it has; leave it out, or use value or qac")
    if preset.baseline == "value" and preset.returns != "to_go":
        yield (
            f"algorithm.baseline: the critic learns rewards to go, and {config.name} takes other returns; use another "
            "baseline, or use reinforce, a2c or ppo"
        )
    decision = config.importance is not None and config.importance.level == "decision"
    if decision and (preset.returns, preset.weigh) != ("to_go", "none"):
        yield (
            "algorithm.importance.level: decision weighs rewards one by one, which is exact for reward-to-go alone; "
            f"with {config.name} use token or sequence, or use reinforce or rloo"
        )
    if decision and preset.baseline not in ("none", "running_mean", "leave_one_out", "value"):
        yield (
            f"algorithm.baseline: {preset.baseline} holds the text's own weighed return, which "
            "importance.level=decision would weigh again; use leave_one_out or value"
        )
    if config.importance is not None and config.importance.self_normalised:
        plain = preset.loss == "policy_gradient" and preset.baseline == "none" and preset.weigh == "none"
        if not plain or preset.returns not in ("to_go", "whole") or preset.scale != "none" or config.pieces:
            yield (
                "algorithm.importance.self_normalised: it takes the weighted mean return away itself, which is exact "
                f"with reinforce alone; with {config.name} as it is set here leave it out"
            )
    idle = unused(config, preset)
    if idle:
        yield (
            f"algorithm.{idle[0]}: {config.name} takes no notice of {', '.join(idle)} as it is set here; leave "
            f"{'it' if len(idle) == 1 else 'them'} out, or choose another preset"
        )


def _wrong_timing(config: AlgorithmConfig, rewards: Sequence[Reward]) -> Iterator[str]:
    dense = [f"'{one.name}' (every {one.every})" for one in rewards if one.every != "end"]
    dense += [f"'{one.name}' (at=span)" for one in rewards if one.every == "end" and one.at == "span"]
    dense += [f"'{KL}' (every token)"] if config.kl and config.kl_as == "reward" else []
    dense += [f"'{ENTROPY}' (every token)"] if config.entropy and config.entropy_as == "reward" else []
    dense += [f"'{TEACHER}' (every token)"] if config.teacher and not config.teacher.whole else []
    if dense:
        yield (
            f"algorithm.name: {config.name} sums rewards over the whole text, so the timing of {', '.join(dense)} "
            "would be lost; use rloo or reinforce, or allow it with algorithm.timing=ignore"
        )
    discounted = [f"'{one.name}'" for one in rewards if discount_of(config, one) != 1.0]
    if discounted:
        yield (
            f"algorithm.name: {config.name} sums rewards over the whole text, so the discount of "
            f"{', '.join(discounted)} would do nothing; use rloo or reinforce, set it to 1, or allow it with "
            "algorithm.timing=ignore"
        )


def _wrong_targets(config: AlgorithmConfig, rewards: Sequence[Reward]) -> Iterator[str]:
    discounted = [f"'{one.name}'" for one in rewards if one.discount is not None]
    if discounted or config.discount != 1.0:
        named = ", ".join([*(["algorithm.discount"] if config.discount != 1.0 else []), *discounted])
        yield (
            f"algorithm.name: {config.name} weighs each target token by what rates it, so a discount ({named}) would "
            "do nothing; leave it out"
        )
    if config.unrated != 1.0 and not rewards:
        yield "algorithm.unrated: there is no reward, so every target token weighs 1; leave it out"


def _wrong_own(config: AlgorithmConfig, rewards: Sequence[Reward]) -> Iterator[str]:
    discounted = [f"'{one.name}'" for one in rewards if one.discount]
    if discounted or config.discount != 1.0:
        named = ", ".join([*(["algorithm.discount"] if config.discount != 1.0 else []), *discounted])
        yield (
            f"algorithm.name: {config.name} credits each piece with its own rewards alone, so a discount ({named}) "
            "would do nothing; leave it out, use rloo or reinforce, or allow it with algorithm.timing=ignore"
        )


def check_sources(
    config: AlgorithmConfig, preset: Preset, sources: Sequence[Source], watched: Sequence[str] = ()
) -> None:
    """Refuses names that clash, nothing to learn from, and discounts that one value cannot hold.

    Args:
        watched: the names of rewards that are measured and not learned from.

    Raises:
        UserError: says which.
    """
    names = [*(source.name for source in sources), *watched]
    twice = next((name for name in DENSE if names.count(name) > 1), None)
    if twice:
        raise UserError(
            f"rewards: '{twice}' is the name of a source of the algorithm's own; give the reward another one"
        )
    if config.name == "distill" and config.teacher is None:
        raise UserError("algorithm.teacher: distill needs one; give teacher.model, teacher.sees, or both")
    if sources and not any(source.earned for source in sources):
        listed = ", ".join(f"'{source.name}'" for source in sources)
        raise UserError(f"rewards: shaping alone ({listed}) leaves nothing to learn; give a reward beside it")
    if not sources and not (config.teacher and config.teacher.whole) and preset.loss != "likelihood":
        raise UserError("rewards: there is none to learn from; give at least one reward function")
    if not sources and (preset.critic or config.pieces):
        idle = "the critic" if preset.critic else "algorithm.pieces"
        raise UserError(f"rewards: there is none, and {idle} has nothing to work on; give at least one, or use distill")
    if preset.returns in ("q", "bellman") and len({source.discount for source in sources}) > 1:
        listed = ", ".join(f"'{source.name}' {source.discount:g}" for source in sources)
        raise UserError(
            f"algorithm.name: {config.name} learns one value for all sources and needs one discount, and there are "
            f"{listed}; give all the same (the KL's is 1), or use a2c"
        )
    if config.teacher and config.teacher.baseline and config.pieces:
        raise UserError("algorithm.teacher.baseline: it is a baseline per token; leave out algorithm.pieces")


def discount_of(config: AlgorithmConfig, one: Reward) -> float:
    """A reward's own discount, or the algorithm's."""
    return config.discount if one.discount is None else one.discount
