"""Every preset, with the critics that it may have and a reference, trains each kind of model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import instant_reward as ir
from instant_reward.presets import PRESETS
from tiny import tiny_folder, tiny_llama, tiny_own
from tiny_seq2seq import seq2seq_folder

torch.set_num_threads(1)
PROMPTS = [
    {"prompt": "the movie was", "text": " good and long"},
    {"prompt": "it was", "text": " bad"},
    {"prompt": "a film of", "text": " the slow"},
]
HEAD, COPY = {"model": "head", "detach": False}, {"model": "copy"}
CASES: list[dict[str, Any]] = [
    {"name": "reinforce", "baseline": "value", "critic": HEAD},
    {"name": "reinforce++", "kl": 0.01},
    {"name": "rloo", "kl": 0.01, "kl_as": "loss", "kl_estimator": "k3", "entropy": 0.001},
    {"name": "rloo", "pieces": "word", "loss": "clipped", "ratio": "piece", "epochs": 2},
    {"name": "grpo", "timing": "ignore", "epochs": 2, "minibatches": 2},
    {"name": "dr_grpo", "timing": "ignore"},
    {"name": "dapo", "timing": "ignore"},
    {"name": "gspo", "timing": "ignore"},
    {"name": "cispo", "timing": "ignore", "kl": 0.01, "reset_reference": 1},
    {"name": "instant"},
    {"name": "value", "critic": COPY},
    {"name": "value", "critic": {"model": "head", "table": True}},
    {"name": "a2c", "critic": HEAD},
    {"name": "a2c", "critic": COPY},
    {"name": "ppo", "critic": HEAD, "kl": 0.01},
    {"name": "ppo", "critic": {**COPY, "clip": 0.2, "warmup": 1}, "epochs": 2},
    {"name": "qac", "critic": HEAD, "top_actions": 20},
    {"name": "qac", "critic": COPY},
    {"name": "vtrace", "critic": COPY},
    {"name": "decoupled_ppo", "critic": HEAD, "importance": "token"},
    {"name": "rwr", "timing": "ignore"},
    {"name": "awr", "critic": COPY},
    {"name": "raft", "timing": "ignore"},
    {"name": "ilql", "critic": {"model": "head"}},
    {"name": "distill", "teacher": {"sees": "{prompt} good", "whole": True}},
    {"name": "likelihood", "by_error": "harder"},
]
OWN = {
    "lstm": ("recurrent", {}),
    "gru": ("recurrent", {"cell": "gru", "tie_word_embeddings": False}),
    "transformer": ("transformer", {}),
}


@ir.reward(every="word")
def vowels(view: ir.View) -> float:
    return sum(character in "aeiou" for character in view.piece) / 3


def test_every_preset_is_here() -> None:
    assert {case["name"] for case in CASES} == set(PRESETS) - {"doubly_robust"}  # of decisions: test_classifier


@pytest.fixture(scope="module", params=[*OWN, "t5"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param not in OWN:
        return seq2seq_folder(tmp_path_factory.mktemp(request.param), request.param)
    kind, shape = OWN[request.param]
    return tiny_folder(tmp_path_factory.mktemp(request.param), tiny_own(kind, dtype=torch.float32, **shape))


@pytest.mark.parametrize("algorithm", CASES, ids=lambda case: f"{case['name']}-{len(str(case))}")
def test_it_trains(algorithm: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """What is measured is finite, the sampler agrees with the trainer, and the weights that should move do."""
    given = {"completion": "text"} if algorithm["name"] in ("ilql", "likelihood") else {}
    guided = {"guide": 0.5} if algorithm["name"] == "ilql" else {}
    config = ir.Config.build(
        {
            "model": {"name": str(model), "dtype": "float32"},
            "data": {"prompts": PROMPTS, **given},
            "algorithm": algorithm,
            "sampling": {"max_new_tokens": 5, **guided},
            "train": {"steps": 2, "prompts_per_step": 2, "group_size": 3, "learning_rate": 1e-2, "threads": 1},
            "out": str(tmp_path / "run"),
        }
    )
    run = ir.train(config, rewards=[vowels])
    assert all(math.isfinite(value) for row in run.metrics for value in row.values())
    gaps = [row["sampler_gap"] for row in run.metrics if "sampler_gap" in row and not algorithm.get("epochs")]
    assert all(gap < 1e-4 for gap in gaps)
    before = ir.load_policy(str(model)).model.state_dict()
    moved = [not torch.equal(before[name], weight) for name, weight in run.policy.model.state_dict().items()]
    assert any(moved) == (algorithm["name"] != "value")
    assert run.policy.sample(["it was"], max_new_tokens=3, **guided)[0].text


@pytest.mark.parametrize("beside", ["llama", "lstm"])
def test_critics_and_teachers_of_another_kind(beside: str, tmp_path: Path) -> None:
    """An LSTM's critic and teacher are a Llama, a Transformer's are an LSTM: only the tokens must be the same."""
    own = {"llama": "recurrent", "lstm": "transformer"}[beside]
    other = tiny_llama(dtype=torch.float32) if beside == "llama" else tiny_own("recurrent", dtype=torch.float32)
    model = tiny_folder(tmp_path / "model", tiny_own(own, dtype=torch.float32, hidden_size=24, num_attention_heads=4))
    folder = tiny_folder(tmp_path / "other", other)
    algorithm = {"name": "ppo", "critic": {"model": str(folder)}, "teacher": {"model": str(folder), "whole": True}}
    config = ir.Config.build(
        {
            "model": {"name": str(model), "dtype": "float32"},
            "data": {"prompts": PROMPTS},
            "algorithm": algorithm,
            "sampling": {"max_new_tokens": 5},
            "train": {"steps": 2, "prompts_per_step": 2, "group_size": 3, "learning_rate": 1e-2, "threads": 1},
            "out": str(tmp_path / "run"),
        }
    )
    run = ir.train(config, rewards=[vowels])
    assert all(math.isfinite(value) for row in run.metrics for value in row.values())
    assert run.metrics[-1]["critic_grad_norm"] > 0
    assert run.policy.critic.base.config.model_type == {"llama": "llama", "lstm": "recurrent"}[beside]
