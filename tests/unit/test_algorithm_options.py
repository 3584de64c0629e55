"""What ``algorithms.build`` refuses, and that it says why: options without effect, clashes, shaping, discounts."""

from __future__ import annotations

from typing import Any

import pytest

import instant_reward as ir
from instant_reward import algorithms
from instant_reward.config import AlgorithmConfig, Config
from instant_reward.presets import PRESETS, preset_of
from instant_reward.rewards.base import as_rewards
from instant_reward.types import UserError

FINAL = ir.reward(every="end", name="final")(lambda view: 1.0)
WORDS = ir.reward(every="word", name="words")(lambda view: 1.0)
TEACHER = {"model": "another"}


def build(rewards: Any = (FINAL,), **options: Any) -> algorithms.Algorithm:
    return algorithms.build(AlgorithmConfig(**options), as_rewards(list(rewards)), max_new_tokens=8)


# What is set, and the presets that take notice of it: every other one must refuse it by name.
SAMPLED = {"reinforce", "reinforce++", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "instant", "a2c", "ppo",
           "vtrace", "decoupled_ppo", "rwr", "awr", "distill"}  # fmt: skip
PLAIN_LOSS = {"reinforce", "rloo", "instant", "a2c", "distill", "rwr", "awr", "decoupled_ppo"}
CLIPPED = {"reinforce++", "grpo", "dr_grpo", "dapo", "gspo", "ppo", "decoupled_ppo"}
LOOKING_AHEAD = {"a2c", "ppo", "vtrace", "decoupled_ppo", "awr"}
CRITIC = LOOKING_AHEAD | {"value", "qac", "doubly_robust", "ilql"}
USED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "lam": ({"lam": 0.5}, LOOKING_AHEAD),
    "lam_length": ({"lam_length": 0.5}, LOOKING_AHEAD),
    "critic": ({"critic": {"weight": 2.0}}, CRITIC),
    "clip_low": ({"clip_low": 0.1}, CLIPPED | {"cispo"}),
    "clip_high": ({"clip_high": 0.1}, CLIPPED | {"cispo"}),
    "ratio": ({"ratio": "sequence"}, CLIPPED - {"decoupled_ppo"}),
    "normalise": ({"normalise": "constant"}, set(PRESETS) - {"value"}),
    "importance": ({"importance": {"level": "token"}}, PLAIN_LOSS | {"doubly_robust"}),
    "refill": ({"refill": 1}, {"dapo"}),
    "keep": ({"keep": 2}, {"raft"}),
    "beta": ({"beta": 2.0}, {"rwr", "awr"}),
    "most_weight": ({"most_weight": 2.0}, {"rwr", "awr"}),
    "top_actions": ({"top_actions": 2}, {"qac", "doubly_robust"}),
    "expectile": ({"expectile": 0.9}, {"ilql"}),
    "cql": ({"cql": 0.5}, {"ilql"}),
    "target_rate": ({"target_rate": 0.5}, {"ilql"}),
    "pieces": ({"pieces": "word"}, set(PRESETS) - {"instant", "qac", "doubly_robust", "ilql", "raft", "likelihood"}),
    "kl_horizon": ({"kl_horizon": 5}, set()),
    "baseline": ({"baseline": "running_mean"}, SAMPLED - LOOKING_AHEAD),
    "scale": ({"scale": "batch"}, SAMPLED),
    "entropy": ({"entropy": 0.1}, set(PRESETS) - {"value"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("option", USED)
def test_options_without_effect_are_named(option: str, name: str) -> None:
    values, takers = USED[option]
    options = {"name": name, **values, **({"teacher": TEACHER} if name == "distill" else {})}
    if name in takers:
        build(**options)
        return
    with pytest.raises(UserError, match=rf"algorithm\.{option}: .*{option}"):
        build(**options)


def test_all_that_is_idle_is_named_at_once() -> None:
    with pytest.raises(UserError, match=r"algorithm\.lam: rloo takes no notice of lam, keep, beta as it is set here"):
        build(name="rloo", lam=0.5, keep=2, beta=3.0)


@pytest.mark.parametrize(
    ("name", "critic", "option"),
    [
        ("a2c", {"detach": False}, "critic.detach"),
        ("ilql", {"lam": 0.5}, "critic.lam"),
        ("qac", {"clip": 0.2}, "critic.clip"),
        ("value", {"warmup": 3}, "critic.warmup"),
        ("a2c", {"table": True}, "critic.table"),
    ],
)
def test_so_are_a_critics(name: str, critic: dict[str, Any], option: str) -> None:
    with pytest.raises(UserError, match=rf"algorithm\.{option}: {name}"):
        build(name=name, critic=critic)
    build(name="a2c", critic={"model": "head", "detach": False, "lam": 0.5, "clip": 0.2, "warmup": 3})


class TestKl:
    def test_estimators_that_are_wrong_as_a_reward_are_refused(self) -> None:
        for estimator in ("k2", "k3"):
            with pytest.raises(UserError, match=rf"kl_estimator: {estimator} paid as a reward has another gradient"):
                build(kl=0.1, kl_estimator=estimator)
            assert build(kl=0.1, kl_estimator=estimator, kl_as="loss").needs.reference

    def test_the_log_ratio_as_a_loss_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"zero expected gradient .*set algorithm\.kl_as to 'reward'"):
            build(kl=0.1, kl_as="loss")

    def test_as_a_reward_it_is_a_source_of_its_own_and_as_a_loss_none(self) -> None:
        sources = build(kl=0.1, discount=0.5).sources
        assert [(one.name, one.weight, one.discount) for one in sources] == [("final", 1.0, 0.5), ("kl", 0.1, 1.0)]
        assert [one.name for one in build(kl=0.1, kl_as="loss", kl_estimator="k2").sources] == ["final"]


class TestNames:
    @pytest.mark.parametrize(
        ("name", "options"),
        [("kl", {"kl": 0.1}), ("teacher", {"teacher": TEACHER}), ("length", {"soft_length": 2})],
    )
    def test_a_reward_may_not_be_called_as_a_source_of_the_algorithms_own(
        self, name: str, options: dict[str, Any]
    ) -> None:
        with pytest.raises(UserError, match=rf"rewards: '{name}' is the name of a source of the algorithm's own"):
            build([FINAL.but(name=name)], name="reinforce", **options)
        build([FINAL], name="reinforce", **options)

    @pytest.mark.parametrize(
        ("name", "options"),
        [("kl", {"kl": 0.1}), ("teacher", {"teacher": TEACHER}), ("length", {"soft_length": 2})],
    )
    def test_nor_may_one_that_is_only_watched(self, name: str, options: dict[str, Any]) -> None:
        """Its marks would be taken for the source's own, and be learned from."""
        watched = FINAL.but(name=name, train=False)
        with pytest.raises(UserError, match=rf"rewards: '{name}' is the name of a source of the algorithm's own"):
            build([FINAL, watched], name="reinforce", **options)
        assert [one.name for one in build([FINAL, watched], name="reinforce").sources] == ["final"]

    def test_without_that_source_the_name_is_free_and_is_a_reward_like_any_other(self) -> None:
        assert [one.name for one in build([WORDS.but(name="length")], name="reinforce").sources] == ["length"]


class TestSources:
    def test_one_value_for_all_needs_one_discount(self) -> None:
        for name in ("qac", "ilql"):
            with pytest.raises(UserError, match=r"needs one discount, and there are 'final' 1, 'words' 0\.5"):
                build([FINAL, WORDS.but(discount=0.5)], name=name)
            with pytest.raises(UserError, match=r"'final' 0\.9, 'kl' 1"):
                build([FINAL], name=name, discount=0.9, kl=0.1)
            build([FINAL, WORDS], name=name, discount=0.9)
        build([FINAL, WORDS.but(discount=0.5)], name="a2c")

    def test_a_critic_has_a_value_for_each_source(self) -> None:
        needs = build([FINAL, WORDS], name="a2c", kl=0.1).needs.critic
        assert needs is not None
        assert (needs.outputs, needs.tables) == (3, 0)
        tables = {"qac": 1, "ilql": 2}
        for name, count in tables.items():
            critic = build([FINAL, WORDS], name=name).needs.critic
            assert critic is not None
            assert (critic.outputs, critic.tables) == (1, count)
            assert bool(critic.target_rate) == (name == "ilql")

    def test_nothing_to_learn_from_is_refused(self) -> None:
        for rewards in ([], [FINAL.but(train=False)]):
            with pytest.raises(UserError, match="rewards: there is none to learn from"):
                build(rewards, name="reinforce")
        assert build([], name="distill", teacher={**TEACHER, "whole": True}).sources == []
        for options in ({"name": "a2c"}, {"name": "reinforce", "pieces": "word"}):
            with pytest.raises(UserError, match="rewards: there is none"):
                build([], teacher={**TEACHER, "whole": True}, **options)

    def test_distilling_needs_a_teacher(self) -> None:
        with pytest.raises(UserError, match=r"algorithm\.teacher"):
            build(name="distill")

    def test_a_baseline_of_the_teacher_and_pieces_do_not_go_together(self) -> None:
        with pytest.raises(UserError, match=r"algorithm\.teacher\.baseline: it is a baseline per token"):
            build(name="reinforce", pieces="word", teacher={**TEACHER, "baseline": True})


class TestShaping:
    """A potential is taken back by later payments: where they do not reach, it would bias."""

    def test_it_is_refused_where_each_piece_gets_its_own_alone(self) -> None:
        with pytest.raises(UserError, match="'phi' is shaping, which later payments take back"):
            build([FINAL, ir.potential(len, 1.0, name="phi")], name="instant")

    @pytest.mark.parametrize("options", [{"name": "grpo", "timing": "ignore"}, {"name": "rloo", "pieces": "word"}])
    def test_a_discount_of_its_own_is_refused_where_it_is_not_paid_by_tokens(self, options: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=r"'phi' is shaped for a discount of 0\.9"):
            build([FINAL, ir.potential(len, 0.9, name="phi")], **options)
        build([FINAL, ir.potential(len, 1.0, name="phi")], **options)

    @pytest.mark.parametrize("name", ["reinforce", "rloo", "a2c", "ppo"])
    def test_it_is_taken_under_reward_to_go(self, name: str) -> None:
        sources = build([FINAL, ir.potential(len, 0.9, name="phi")], name=name).sources
        assert [(one.name, one.discount, one.final) for one in sources] == [("final", 1.0, True), ("phi", 0.9, True)]


class TestImportance:
    def test_reward_by_reward_it_is_exact_for_reward_to_go_alone(self) -> None:
        for name in ("a2c", "rwr", "instant"):
            with pytest.raises(UserError, match=r"algorithm\.importance\.level: decision"):
                build(name=name, importance={"level": "decision"})
        assert build(name="rloo", importance={"level": "decision"}).needs.proximal

    def test_decoupled_has_weights_whether_they_are_named_or_not(self) -> None:
        assert build(name="decoupled_ppo").needs.proximal

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"level": "sequence", "most": 0.9, "beyond": "mask"}, "most must be above 1"),
            ({"level": "decision", "most": 2.0, "beyond": "mask"}, "has no meaning for level=decision"),
        ],
    )
    def test_bounds_that_make_no_sense_are_refused(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AlgorithmConfig(importance=values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": "piece"}, "ratio=piece needs pieces"),
        ({"importance": {"level": "piece"}}, r"importance\.level=piece needs pieces"),
        ({"kl_target": 0.1}, "kl_target adapts the weight kl"),
        ({"entropy_target": 1.0}, "entropy_target adapts the weight entropy"),
        ({"reset_reference": 3}, "reset_reference needs a reference"),
        ({"teacher": {}}, "give model .* sees"),
        ({"teacher": {**TEACHER, "whole": True, "discount": 1.0}}, "whole is a loss"),
        ({"teacher": {**TEACHER, "baseline": True, "discount": 0.5}}, "baseline needs discount 0"),
        ({"kl": 0.1, "reset_reference": 3, "teacher": {"sees": "{prompt}"}}, "would move the teacher along"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config.build({"data": {"prompts": ["x"]}, "algorithm": options})


def test_a_clip_that_is_no_bound_is_refused() -> None:
    with pytest.raises(UserError, match=r"algorithm\.clip_low: 1\.0 is no bound on a ratio"):
        build(name="ppo", clip_low=1.0)
    assert build(name="cispo").preset.clip_low == 1.0


def test_a_loss_of_its_own_stays() -> None:
    for name in ("qac", "ilql", "value"):
        with pytest.raises(UserError, match=rf"algorithm\.loss: {name} has a loss of its own"):
            build(name=name, loss="clipped")


@pytest.mark.parametrize("name", ["rloo", "grpo", "raft", "dapo", "instant", "rwr"])
def test_presets_that_compare_siblings_need_some(name: str) -> None:
    options = {"name": name, "timing": "ignore"}
    assert preset_of(AlgorithmConfig(**options)).groups
    with pytest.raises(UserError, match=rf"train\.group_size: must be at least 2 for {name}"):
        Config.build({"data": {"prompts": ["x"]}, "algorithm": options, "train": {"group_size": 1}})
