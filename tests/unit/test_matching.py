"""Pairs of package texts, and an encoder that gets labels."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import instant_reward as ir
from deciding import LABELS, LONGEST, WORDS, classifier_folder, word_tokenizer
from instant_reward.config import Config
from instant_reward.imports import resolve
from instant_reward.policies.classifier import ClassifierPolicy
from instant_reward.run import Run
from instant_reward.start import load_run_policy
from instant_reward.types import UserError

DECISIONS = Path(__file__).parents[2] / "recipes" / "decisions.py"
FAMILIES = 60
ROWS = [{"prompt": ["the film", "a joy"], "label": "good"}, {"prompt": ["the film", "dull"], "label": "bad"}]


@pytest.fixture
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as apt keeps it: families of two packages, whose descriptions begin with the same paragraph."""
    records = []
    for number in range(FAMILIES):
        for what in ("library", "documentation"):
            records.append(
                f"Package: p{number}-{what}\nDescription-en: the {what} number{number}\n"
                f" number{number} is a thing of many words that\n go on for some lines and end here.\n .\n"
                f" It holds the {what}.\n"
            )
    records.append(records[0])  # each text comes once
    records.append("Package: short\nDescription-en: short\n Too short.\n")
    (tmp_path / "debian_i18n_Translation-en").write_text("\n".join(records))

    def read(command: list[str], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(stdout=Path(command[-1]).read_bytes())

    monkeypatch.setitem(resolve(f"{DECISIONS}:package_pairs").__globals__, "subprocess", SimpleNamespace(run=read))
    return tmp_path


def test_each_description_comes_with_its_own_summary_and_with_its_siblings(lists: Path) -> None:
    pairs = resolve(f"{DECISIONS}:package_pairs")
    train, held_out = pairs(lists=str(lists)), pairs("held_out", lists=str(lists))
    assert len(train) + len(held_out) == 4 * FAMILIES
    assert held_out
    for row in [*train, *held_out]:
        summary, text = row["prompt"]
        own = ("documentation" in summary) == ("documentation" in text)
        assert (row["label"] == "same") == own
        assert summary.split()[-1] in text.split(), "the wrong summary is that of the most similar package"
    apart = [{text for row in rows for text in row["prompt"]} for rows in (train, held_out)]
    assert not apart[0] & apart[1]
    some = pairs(lists=str(lists), limit=10)
    assert sorted(row["label"] for row in some) == ["other"] * 5 + ["same"] * 5


def test_a_large_family_comes_with_few_of_its_packages(lists: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = resolve(f"{DECISIONS}:package_pairs")
    monkeypatch.setitem(pairs.__globals__, "A_FAMILY", 1)
    assert len(pairs(lists=str(lists))) + len(pairs("held_out", lists=str(lists))) == 2 * FAMILIES


def test_no_long_descriptions_is_an_error_that_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get update"):
        resolve(f"{DECISIONS}:package_pairs")(lists=str(tmp_path))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "model"
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=LONGEST, **size)).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def test_labels_make_a_classifier_of_an_encoder(encoder: Path, tmp_path: Path) -> None:
    policy = ir.load_policy(str(encoder), labels=LABELS, seed=3)
    assert isinstance(policy, ClassifierPolicy)
    assert policy.labels == LABELS
    own = BertModel.from_pretrained(encoder).state_dict()
    assert all(torch.equal(policy.model.bert.state_dict()[name], value) for name, value in own.items())
    head = policy.output_head(policy.model).weight
    for seed, same in ((3, True), (4, False)):
        other = ir.load_policy(str(encoder), labels=LABELS, seed=seed)
        assert torch.equal(other.output_head(other.model).weight, head) == same  # type: ignore[attr-defined]
    assert json.loads((policy.save(tmp_path / "saved") / "config.json").read_text())["label2id"]["good"] == 2
    again = ir.load_policy(str(tmp_path / "saved"))
    assert again.labels == LABELS  # type: ignore[attr-defined]


def test_labels_that_are_missing_or_too_many_are_refused(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no labels to choose from"):
        ir.load_policy(str(encoder), kind="classifier")
    with pytest.raises(UserError, match="has labels of its own"):
        ir.load_policy(str(classifier_folder(tmp_path / "model")), labels=LABELS)
    with pytest.raises(UserError, match="labels are of a classifier"):
        ir.load_policy(str(encoder), labels=LABELS, kind="causal")
    for labels, said in ((["one"], "two labels that differ"), (["one", "one"], "two labels that differ")):
        with pytest.raises(UserError, match=said):
            Config.build({"model": {"name": "x", "labels": labels}, "data": {"prompts": ROWS}})
    scratch = {"config": {"model_type": "bert"}, "labels": LABELS}
    with pytest.raises(UserError, match="under scratch"):
        Config.build({"model": {"scratch": scratch, "labels": LABELS}, "data": {"prompts": ROWS}})


@ir.reward(every="end")
def right(view: ir.View) -> float:
    return float(view.text == view.info["label"])


def test_a_run_that_begins_with_new_labels_is_resumed_bit_for_bit(encoder: Path, tmp_path: Path) -> None:
    def run(out: Path, steps: int, resume: bool = False) -> ir.Run:
        values: dict[str, Any] = {
            "model": {"name": str(encoder), "labels": LABELS, "dtype": "float32"},
            "data": {"prompts": ROWS},
            "algorithm": {"name": "rloo", "kl": 0.1},
            "sampling": {"max_new_tokens": 1},
            "train": {"steps": steps, "prompts_per_step": 2, "group_size": 4, "learning_rate": 3e-3, "save_every": 1,
                      "threads": 1},
            "seed": 5,
            "out": str(out),
        }  # fmt: skip
        return ir.train(Config.build(values), rewards=[right], resume=resume)

    whole = run(tmp_path / "whole", 4).policy.model.state_dict()
    run(tmp_path / "parts", 2)
    config = tmp_path / "parts" / "config.yaml"
    config.write_text(config.read_text().replace("steps: 2", "steps: 4"))
    parts = run(tmp_path / "parts", 4, resume=True).policy.model.state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    loaded, _ = load_run_policy(Run.open(tmp_path / "whole").path)
    assert all(torch.equal(whole[name], value) for name, value in loaded.model.state_dict().items())
