"""Summaries by extraction: sentences of any script, their text and its rewards, and documents that cannot be used."""

from __future__ import annotations

import json
import math
import shutil
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import instant_reward as ir
from choosing import DOCUMENTS, encoder_folder, tiny_extractive, tiny_reading
from instant_reward.config_scratch import ScratchConfig
from instant_reward.data import load_rows
from instant_reward.policies.extractive import ExtractivePolicy, new_extractive, split
from instant_reward.policies.kinds import kind_of
from instant_reward.policies.scratch import new_policy
from instant_reward.rewards.metrics import Rouge
from instant_reward.screen import Screen
from instant_reward.train import learn, prepare
from instant_reward.types import UserError
from tiny_seq2seq import seq2seq_folder

READS = {"model_type": "sentences", "hidden_size": 8, "layers": 1, "heads": 2, "max_words": 30, "max_sentences": 6}


def test_sentences_of_any_script() -> None:
    assert [one.strip() for one in split("Dr. No came. He left!  Why?\nNobody knows")] == [
        "Dr. No came.", "He left!", "Why?", "Nobody knows",
    ]  # fmt: skip
    assert split("这是一句。那是两句！") == ["这是一句。", "那是两句！"]
    assert split("  \n ") == []
    assert split("") == []
    text = "One. Two! 三。四"
    assert "".join(split(text)) == text


def test_the_text_is_the_sentences_in_the_order_of_choice() -> None:
    policy = tiny_extractive()
    english, chinese, alone = policy.prompts(
        [{"prompt": " One here.  Two there.\nThree. "}, {"prompt": "一。二。三。"}, {"prompt": "Alone"}], "prompt", 3
    )
    stream = policy.decoder().stream(english)
    assert list(accumulate(map(stream.push, [3, 1, 0]))) == ["Three.", "Three. One here.", "Three. One here."]
    stream = policy.decoder().stream(chinese)
    twin = stream.copy()
    assert [stream.push(one) for one in (2, 1)] == ["二。", "一。"]
    assert twin.push(3) == "三。"
    assert policy.names(alone) == ["", "Alone"]
    assert not policy.over([1], english)
    assert policy.over([1, 0], english)
    assert policy.over([1], alone), "no sentence is left"


def test_each_choice_is_paid_what_it_changed() -> None:
    policy = tiny_extractive()
    rouge = Rouge("L")
    rows = [{"prompt": "A cat sat. Birds sing a lot. The dog ran.", "reference": "the dog ran a lot"}]
    for rollout in policy.sample(rows, per_prompt=6, max_new_tokens=4, rewards=[ir.change(rouge, every="token")]):
        scores = [rouge.score(rollout.text[:end], "the dog ran a lot") for end in rollout.char_ends]
        paid = list(accumulate(mark.value for mark in rollout.marks))
        assert paid == pytest.approx(scores, abs=1e-12)
        assert [mark.seen for mark in rollout.marks] == list(range(1, len(rollout.token_ids) + 1))


def test_documents_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    policy = tiny_extractive(max_sentences=3)
    file = tmp_path / "documents.jsonl"

    def told(document: object) -> str:
        file.write_text(json.dumps({"prompt": "Fine. Good."}) + "\n" + json.dumps({"prompt": document}) + "\n")
        with pytest.raises(UserError) as error:
            policy.prompts(load_rows(file), "prompt", 3)
        return str(error.value)

    assert "line 2" in told("")
    assert "without a sentence" in told("  \n ")
    assert "4 sentences" in told("A. b c. D e. F g. H i.") or "5 sentences" in told("A b. C d. E f. G h. I j.")
    assert "line 2" in told("A b. C d. E f. G h.")
    assert "a list for a document" in told([{"role": "user", "content": "x"}])


def test_summaries_that_are_given_must_be_of_whole_sentences() -> None:
    policy = tiny_extractive()
    (prompt,) = policy.prompts([{"prompt": "One here. Two there. One here."}], "prompt", 3)
    assert policy.actions_of("Two there. One here.", prompt) == [2, 1, 0]
    assert policy.actions_of("One here. One here. Two there.", prompt) == [1, 3, 2], "over without a stop"
    assert policy.actions_of("", prompt) == [0]
    for text in ("Two", "Two there. Two there."):
        with pytest.raises(UserError, match="no further one"):
            policy.actions_of(text, prompt)


def test_sentences_without_words_and_very_long_ones_are_read() -> None:
    policy = tiny_extractive(max_words=5)
    rollouts = policy.sample([{"prompt": "!!! ... " + "word " * 400 + ". --- ."}], per_prompt=4)
    assert all(torch.isfinite(torch.tensor(rollout.logprobs)).all() for rollout in rollouts)
    assert all(len(words) <= 5 for rollout in rollouts for words in rollout.context or [])


def test_the_folder_says_what_it_holds(tmp_path: Path) -> None:
    assert kind_of(tiny_extractive().save(tmp_path)) == "extractive"
    with pytest.raises(UserError, match="trained whole"):
        ir.load_policy(str(tmp_path), lora={"rank": 2})
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be loaded"):
        ir.load_policy(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hiden_size": 8}, "no such key"),
        ({"layers": 0}, "above 0"),
        ({"buckets": 2}, "above 2"),
        ({"hidden_size": 6, "heads": 4}, "multiple of heads"),
        ({"heads": "4"}, "above 0"),
    ],
    ids=str,
)
def test_new_models_by_plain_values(changes: dict[str, object], told: str) -> None:
    values = {"model_type": "sentences", "hidden_size": 8, "heads": 2, "buckets": 32}
    policy = new_policy(ScratchConfig(config=values), [])
    texts = policy.sample([{"prompt": "One a. Two b. Three c."}], per_prompt=4)
    assert all(text.logprobs[0] == pytest.approx(-math.log(4), abs=1e-6) for text in texts), "all choices alike"
    with pytest.raises(UserError, match=told):
        new_policy(ScratchConfig(config={**values, **changes}), [])


def test_a_new_model_draws_from_a_seed_of_its_own() -> None:
    """The caller's random numbers go on where they were."""
    state = torch.get_rng_state()
    one, other = (new_extractive({"hidden_size": 8, "heads": 2}, 3, torch.float32, "cpu") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, one.model.parameters(), other.model.parameters()))


def test_a_pretrained_encoder_reads_the_sentences(tmp_path: Path) -> None:
    """A sentence's vector is the mean of the states that the encoder has in its own folder."""
    folder = encoder_folder(tmp_path / "encoder")
    theirs, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    policy = new_policy(ScratchConfig(config={**READS, "encoder": str(folder)}), [])
    assert isinstance(policy, ExtractivePolicy)
    (prompt,) = policy.prompts([{"prompt": "A b c. D e."}], "prompt", 3)
    assert prompt.context == [tokenizer(text)["input_ids"] for text in ("A b c.", "D e.")]
    reader = policy.model.encoder.sentences
    with torch.no_grad():
        means = torch.stack(
            [theirs(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in ("A b c.", "D e.")]
        )
        assert torch.allclose(reader(prompt.context), reader.bag(means), atol=1e-5)
        reader.frozen = False
        assert torch.allclose(reader(prompt.context), reader.bag(means), atol=1e-5)
    cut = new_policy(ScratchConfig(config={**READS, "encoder": str(folder), "max_words": 5}), [])
    assert [len(one) for one in cut.prompts([{"prompt": "A b c. D."}], "prompt", 3)[0].context or []] == [5, 4]


@pytest.mark.parametrize("frozen", [True, False])
def test_the_encoder_is_trained_or_stays_and_the_run_keeps_it(tmp_path: Path, frozen: bool) -> None:
    folder = encoder_folder(tmp_path / "encoder")
    values = {
        "model": {"scratch": {"config": {**READS, "encoder": str(folder), "frozen": frozen}}, "dtype": "float32"},
        "data": {"prompts": list(DOCUMENTS)},
        "sampling": {"max_new_tokens": 2},
        "train": {"steps": 2, "prompts_per_step": 4, "group_size": 4, "learning_rate": 0.05, "save_every": 1},
        "out": str(tmp_path / "run"),
    }
    first = ir.train(ir.Config.build(values), rewards=[len])
    shutil.rmtree(folder)
    read = []
    values["train"] = {**values["train"], "steps": 4}  # type: ignore[dict-item]
    job = prepare(ir.Config.build(values), [len], resume=True)
    reader = job.policy.model.encoder.sentences
    reader.model.register_forward_hook(lambda _, __, made: read.append(len(made.last_hidden_state)))
    with Screen(4) as screen:
        learn(job, screen)
    start = ir.load_policy(str(tmp_path / "run" / "start")).model.encoder.sentences
    moved = [
        not torch.equal(one, other)
        for one, other in zip(reader.model.parameters(), start.model.parameters(), strict=True)
    ]
    assert any(moved) != frozen
    assert all(one.requires_grad != frozen for one in reader.model.parameters())
    assert not torch.equal(reader.bag.weight, start.bag.weight)
    assert torch.equal(start.bag.weight, ir.load_policy(str(first.path / "start")).model.encoder.sentences.bag.weight)
    sentences = {sentence.strip() for text in DOCUMENTS for sentence in split(text)}
    assert (read == [1] * len(sentences)) == frozen, (
        "a frozen encoder reads a sentence once for all copies of the model"
    )


def test_an_encoder_that_cannot_read_is_refused(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "encoder")
    for changes, told in (
        ({"encoder": 3}, "must be a model's folder"),
        ({"encoder": str(tmp_path / "no")}, "there is no model"),
        ({"encoder": str(seq2seq_folder(tmp_path / "t5", "t5"))}, "no encoder alone"),
        ({"encoder": str(folder), "buckets": 64}, "buckets: the encoder has tokens of its own"),
        ({"encoder": str(folder), "frozen": 1}, "frozen: 1 must be true or false"),
        ({"encoder": str(folder), "max_words": 99}, "max_words: the encoder reads 40 tokens"),
        ({"frozen": True}, "frozen: there is no encoder"),
        ({"reader": {}}, "no such key"),
    ):
        with pytest.raises(UserError, match=told):
            new_policy(ScratchConfig(config={**READS, **changes}), [])
    policy = tiny_reading()
    other = tiny_extractive(max_sentences=6, max_words=30, buckets=8192).save(tmp_path / "words")
    with pytest.raises(UserError, match="another reader than the policy"):
        policy.load_beside(str(other), "algorithm.teacher.model")
    policy.load_beside(str(policy.save(tmp_path / "same")), "algorithm.teacher.model")
