"""The named algorithms as plain data: each is a choice of credit and loss (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from instant_reward.config_algorithm import AlgorithmConfig


@dataclass(frozen=True)
class Preset:
    """One named choice.

    Attributes:
        returns: "to_go" keeps when each reward came; "whole" sums them over the text; "own" credits each piece with its
            own rewards alone; "gae" and "vtrace" look ahead with a critic of prefixes; "q" learns a critic of next
            tokens; "bellman" learns one from given texts.
        baseline: what is taken away: "none", "running_mean" (of the steps before), "batch_mean", "leave_one_out"
            (siblings, at each position), "group_mean" (the text itself included), "value" (the critic's, of the
            prefix).
        scale: "none", or advantages divided by the deviation of the group's totals, or of the batch's advantages;
            "whiten" also takes the batch's mean away.
        loss: "policy_gradient", "clipped", "cispo", "all_actions" (summed over next tokens), "doubly_robust"
            (the same, and the weighted error of Q at the logged one), "ilql", "likelihood" (of given texts, whose
            rewards are weights), or "none".
        normalise: what the loss is averaged over.
        weigh: "exponential" and "best" turn advantages into weights of a likelihood.
        ratio: in the clipped loss: of the token, its piece or the whole text; "decoupled": of the token, to the policy
            as it was when the step began, with importance weights for the rest.
        clip_low, clip_high: the bounds of the ratio.
        skip_equal: leave out groups whose texts all earned the same, and sample others.
    """

    returns: Literal["to_go", "whole", "own", "gae", "vtrace", "q", "bellman"]
    baseline: Literal["none", "running_mean", "batch_mean", "leave_one_out", "group_mean", "value"]
    scale: Literal["none", "group", "batch", "whiten"]
    loss: Literal["policy_gradient", "clipped", "cispo", "all_actions", "doubly_robust", "ilql", "likelihood", "none"]
    normalise: Literal["text", "tokens", "constant", "text_mean"]
    weigh: Literal["none", "exponential", "best"] = "none"
    ratio: Literal["token", "piece", "sequence", "decoupled"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    skip_equal: bool = False

    @property
    def critic(self) -> bool:
        """Whether it learns values."""
        return self.returns in ("gae", "vtrace", "q", "bellman") or self.baseline == "value"

    @property
    def groups(self) -> bool:
        """Whether it compares the texts of one prompt, and so needs two or more."""
        compared = self.baseline in ("leave_one_out", "group_mean") or self.scale == "group"
        return compared or self.weigh == "best" or self.skip_equal


PRESETS = {
    "reinforce": Preset("to_go", "none", "none", "policy_gradient", "text"),
    "reinforce++": Preset("to_go", "none", "whiten", "clipped", "tokens"),
    "rloo": Preset("to_go", "leave_one_out", "none", "policy_gradient", "text"),
    "grpo": Preset("whole", "group_mean", "group", "clipped", "tokens"),
    "dr_grpo": Preset("whole", "group_mean", "none", "clipped", "constant"),
    "dapo": Preset("whole", "group_mean", "group", "clipped", "tokens", clip_high=0.28, skip_equal=True),
    "gspo": Preset(
        "whole", "group_mean", "group", "clipped", "text_mean", ratio="sequence", clip_low=3e-4, clip_high=4e-4
    ),
    "cispo": Preset("whole", "group_mean", "group", "cispo", "tokens", clip_low=1.0, clip_high=4.0),
    "instant": Preset("own", "leave_one_out", "none", "policy_gradient", "text"),
    "value": Preset("gae", "none", "none", "none", "tokens"),
    "a2c": Preset("gae", "none", "none", "policy_gradient", "text"),
    "ppo": Preset("gae", "none", "whiten", "clipped", "tokens"),
    "qac": Preset("q", "none", "none", "all_actions", "text"),
    "doubly_robust": Preset("q", "none", "none", "doubly_robust", "text"),
    "vtrace": Preset("vtrace", "none", "none", "policy_gradient", "text"),
    "decoupled_ppo": Preset("gae", "none", "whiten", "clipped", "tokens", ratio="decoupled"),
    "rwr": Preset("whole", "group_mean", "none", "policy_gradient", "tokens", weigh="exponential"),
    "awr": Preset("gae", "none", "none", "policy_gradient", "tokens", weigh="exponential"),
    "raft": Preset("whole", "none", "none", "policy_gradient", "tokens", weigh="best"),
    "ilql": Preset("bellman", "none", "none", "ilql", "tokens"),
    "distill": Preset("to_go", "none", "none", "policy_gradient", "tokens"),
    "likelihood": Preset("own", "none", "none", "likelihood", "tokens"),
}


def preset_of(config: AlgorithmConfig) -> Preset:
    """The preset that a config names, with the fields that the config sets itself."""
    own = {field.name for field in fields(Preset)} & set(type(config).model_fields)
    chosen = {key: getattr(config, key) for key in own if getattr(config, key) is not None}
    preset = replace(PRESETS[config.name], **chosen)
    # A critic that is fit alone may be one of next tokens.
    return replace(preset, returns="q") if preset.loss == "none" and config.critic.table else preset


def unused(config: AlgorithmConfig, preset: Preset) -> list[str]:
    """The options that a config sets and that this choice would take no notice of."""
    values = preset.returns in ("gae", "vtrace")
    compared = preset.returns in ("to_go", "whole", "own")
    likelihood = preset.loss == "likelihood"
    learns = preset.loss not in ("none", "ilql", "likelihood")
    own_ratio = PRESETS[config.name].ratio != "decoupled"
    sampled = learns and preset.loss not in ("all_actions", "doubly_robust")
    used = {
        "baseline": compared and preset.weigh != "best" and not likelihood,
        "scale": sampled and preset.weigh != "best",
        "ratio": preset.loss == "clipped" and own_ratio,
        "clip_low": preset.loss in ("clipped", "cispo"),
        "clip_high": preset.loss in ("clipped", "cispo"),
        "loss": sampled and preset.weigh == "none" and preset.returns != "vtrace" and own_ratio,
        "kl_as": config.kl > 0,
        "kl_estimator": config.kl > 0,
        "normalise": preset.loss != "none",
        "pieces": preset.returns in ("to_go", "whole", "gae", "vtrace") and preset.weigh != "best",
        "timing": not likelihood,
        "biased_placement": not likelihood,
        "biased_baseline": not likelihood,
        "unrated": likelihood,
        "by_error": likelihood,
        "lam": values and preset.loss != "none",
        "lam_length": values and preset.loss != "none",
        "kl": not likelihood if config.kl_as == "reward" else preset.loss != "none",
        "teacher": preset.loss != "none" if config.teacher is not None and config.teacher.whole else not likelihood,
        "stop_kl": sampled,
        "critic": preset.critic,
        "importance": _weighs(preset),
        "entropy": not likelihood if config.entropy_as == "reward" else preset.loss != "none",
        "soft_length": not likelihood,
        "skip_equal": not likelihood,
        "entropy_as": config.entropy > 0,
        "kl_horizon": config.kl_target is not None,
        "refill": preset.skip_equal,
        "keep": preset.weigh == "best",
        "beta": preset.weigh == "exponential",
        "most_weight": preset.weigh == "exponential",
        "top_actions": preset.loss in ("all_actions", "doubly_robust"),
        "expectile": preset.loss == "ilql",
        "cql": preset.loss == "ilql",
        "target_rate": preset.loss == "ilql",
    }
    default = AlgorithmConfig()
    idle = [key for key, fits in used.items() if not fits and getattr(config, key) != getattr(default, key)]
    if not preset.critic:
        return idle
    used = {
        "detach": config.critic.model == "head" and preset.loss != "none",
        "lam": preset.returns != "bellman",
        "clip": values or preset.baseline == "value",
        "warmup": learns,
        "bootstrap": preset.returns in ("gae", "vtrace", "q", "bellman"),
    }
    own = [key for key, fits in used.items() if not fits]
    return idle + [f"critic.{key}" for key in own if getattr(config.critic, key) != getattr(default.critic, key)]


def _weighs(preset: Preset) -> bool:
    """Whether importance weights have a place in the loss: clipped losses have ratios of their own."""
    if preset.loss == "clipped":
        return preset.ratio == "decoupled"
    plain = preset.loss == "policy_gradient" and preset.weigh != "best" and preset.returns != "vtrace"
    return plain or preset.loss == "doubly_robust"
