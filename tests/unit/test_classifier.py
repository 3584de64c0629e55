"""A classifier as a policy: loaded, trained by every preset that fits, resumed, saved; and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import instant_reward as ir
from deciding import LABELS, LONGEST, WORDS, classifier_folder, tiny_bert, tiny_classifier, word_tokenizer
from instant_reward import assemble
from instant_reward.batch import collate
from instant_reward.config import Config
from instant_reward.policies.classifier import ClassifierPolicy
from instant_reward.policies.optimizer import Optimization
from instant_reward.types import Needs, UserError
from what_counts import plain

ROWS = [
    {"prompt": "the film was great", "label": "good"},
    {"prompt": "the film was dull", "label": "bad"},
    {"prompt": "a joy", "label": "good"},
    {"prompt": "slow", "label": "bad"},
]
SIZE: dict[str, Any] = {"vocab_size": len(WORDS), "num_labels": 3, "pad_token_id": 0}


@ir.reward(every="end")
def right(view: ir.View) -> float:
    return float(view.text == view.info["label"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_folder(tmp_path_factory.mktemp("classifier") / "model")


def run(folder: Path, out: Path, steps: int = 2, resume: bool = False, **sections: Any) -> ir.Run:
    values: dict[str, Any] = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"prompts": ROWS},
        "algorithm": {"name": "rloo"},
        "sampling": {"max_new_tokens": 1},
        "train": {"steps": steps, "prompts_per_step": 4, "group_size": 4, "learning_rate": 3e-3, "save_every": 1,
                  "threads": 1},
        "out": str(out),
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return ir.train(Config.build(values), rewards=[right], resume=resume)


OPTIONS: dict[str, dict[str, Any]] = {
    "reinforce": {"baseline": "running_mean", "entropy": 0.01},
    "reinforce++": {"kl": 0.05},
    "rloo": {"kl": 0.05, "entropy": 0.01},
    "grpo": {"kl": 0.05, "kl_as": "loss", "kl_estimator": "k3"},
    "dr_grpo": {}, "dapo": {}, "gspo": {}, "cispo": {}, "instant": {}, "value": {},
    "a2c": {"critic": {"model": "head", "detach": False}},
    "ppo": {"kl": 0.05},
    "qac": {"critic": {"model": "head"}},
    "vtrace": {}, "decoupled_ppo": {}, "rwr": {}, "awr": {}, "raft": {},
    "ilql": {"critic": {"model": "head"}},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_preset_takes_decisions(folder: Path, tmp_path: Path, name: str) -> None:
    given = {"completion": "label"} if name == "ilql" else {}
    done = run(folder, tmp_path / "run", data=given, algorithm={"name": name, **OPTIONS[name]})
    assert [row["length"] for row in done.metrics] == [1.0, 1.0]
    assert all(row["ended"] == 1.0 for row in done.metrics)
    assert name == "value" or all(row["sampler_gap"] < 1e-4 for row in done.metrics if "sampler_gap" in row)


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_a_resumed_run_is_the_same_bit_for_bit(folder: Path, tmp_path: Path, algorithm: str) -> None:
    whole = run(folder, tmp_path / "whole", steps=4, algorithm={"name": algorithm, "kl": 0.1})
    run(folder, tmp_path / "parts", steps=2, algorithm={"name": algorithm, "kl": 0.1})
    config = tmp_path / "parts" / "config.yaml"
    config.write_text(config.read_text().replace("steps: 2", "steps: 4"))
    parts = run(folder, tmp_path / "parts", steps=4, resume=True, algorithm={"name": algorithm, "kl": 0.1})
    mine, theirs = whole.policy.model.state_dict(), parts.policy.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_it_learns_from_the_reward_of_the_chosen_label_alone(folder: Path, tmp_path: Path) -> None:
    done = run(folder, tmp_path / "run", steps=80, train={"save_every": None})
    assert sum(row["reward"] for row in done.metrics[:3]) / 3 < 0.6
    assert sum(row["reward"] for row in done.metrics[-5:]) / 5 > 0.9


@pytest.mark.parametrize("algorithm", ["raft", "likelihood"])
def test_labels_of_the_data_are_imitated(folder: Path, tmp_path: Path, algorithm: str) -> None:
    done = run(folder, tmp_path / "run", steps=30, data={"completion": "label"}, algorithm={"name": algorithm})
    chosen = done.policy.sample([row["prompt"] for row in ROWS], temperature=0)
    assert [text.text for text in chosen] == [row["label"] for row in ROWS]


def test_what_is_saved_is_what_transformers_loads(folder: Path, tmp_path: Path) -> None:
    policy = ir.load_policy(str(folder))
    assert isinstance(policy, ClassifierPolicy)
    assert policy.labels == LABELS
    texts = policy.sample([row["prompt"] for row in ROWS], per_prompt=2)
    again = ir.load_policy(str(policy.save(tmp_path / "saved")))
    assert torch.equal(again.score(collate(texts)), policy.score(collate(texts)))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    read = word_tokenizer()(ROWS[0]["prompt"], return_tensors="pt")
    with torch.no_grad():
        logs = model(**read).logits.log_softmax(-1)[0]
    assert texts[0].logprobs[0] == pytest.approx(float(logs[texts[0].token_ids[0]]), abs=1e-5)


def test_a_pair_is_read_as_transformers_reads_it() -> None:
    policy = tiny_classifier(torch.float32)
    (text,) = policy.sample([{"prompt": ["not a joy", "dull"]}])
    read = word_tokenizer()("not a joy", "dull", return_tensors="pt")
    with torch.no_grad():
        logs = policy.model(**read).logits.log_softmax(-1)[0]
    assert text.logprobs[0] == pytest.approx(float(logs[text.token_ids[0]]), abs=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        DistilBertForSequenceClassification(
            DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=16, **SIZE)
        ),
        RobertaForSequenceClassification(
            RobertaConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                max_position_embeddings=17, type_vocab_size=2, **SIZE,
            )
        ),
    ],
    ids=["DistilBERT", "RoBERTa"],
)  # fmt: skip
def test_models_of_other_shapes(model: Any) -> None:
    tokenizer = word_tokenizer()
    if "Distil" in type(model).__name__:
        tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    policy = ClassifierPolicy(model, tokenizer)
    assert policy.context == 16
    texts = policy.sample(["the film was great", "slow"], per_prompt=3)
    found = policy.score(collate(texts))
    assert torch.allclose(found, torch.tensor([text.logprobs for text in texts]), atol=1e-5)
    read = tokenizer("the film was great", return_tensors="pt")
    with torch.no_grad():
        logs = model(**read).logits.log_softmax(-1)[0]
    assert texts[0].logprobs[0] == pytest.approx(float(logs[texts[0].token_ids[0]]), abs=1e-5)


def test_a_model_whose_logits_are_something_else_is_refused() -> None:
    model = GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=1, n_head=2, **SIZE))
    with pytest.raises(UserError, match="last linear layer"):
        ClassifierPolicy(model, word_tokenizer())


def like(shape: str, **changes: Any) -> Any:
    """A classifier of another shape, for the same tokenizer."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    sizes = {} if shape == "bart" else sizes
    config = AutoConfig.for_model(shape, **sizes, max_position_embeddings=16, **SIZE, **changes)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def test_a_model_needs_no_attention_of_a_certain_kind(tmp_path: Path) -> None:
    """DeBERTa has an attention of its own."""
    model = like("deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False)
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    policy = ir.load_policy(str(tmp_path))
    texts = policy.sample(["the film was great", "slow"], per_prompt=3)
    with torch.no_grad():
        logs = model.eval()(**word_tokenizer()("slow", return_tensors="pt")).logits.log_softmax(-1)[0]
    assert texts[3].logprobs[0] == pytest.approx(float(logs[texts[3].token_ids[0]]), abs=1e-5)


def test_texts_without_the_end_that_a_model_looks_for_are_refused() -> None:
    """BART's classifier reads the state of the end token, which this tokenizer does not write."""
    shape = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "eos_token_id": WORDS.index("dull")}
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    with pytest.raises(UserError, match="does not read the texts of its tokenizer"):
        ClassifierPolicy(like("bart", **shape, **heads), word_tokenizer())


def test_a_model_that_reads_padding_is_refused() -> None:
    """ConvBERT's convolutions do: what it says of a text hangs on what is read beside it."""
    with pytest.raises(UserError, match="side by side"):
        ClassifierPolicy(like("convbert", embedding_size=8), word_tokenizer())


def test_a_vocabulary_that_does_not_match_is_refused() -> None:
    with pytest.raises(UserError, match="do not belong together"):
        ClassifierPolicy(tiny_bert(vocab_size=len(WORDS) - 1), word_tokenizer())


def test_labels_that_are_one_or_alike_are_refused() -> None:
    model = tiny_bert()
    model.config.id2label = {0: "good", 1: "good", 2: "bad"}
    with pytest.raises(UserError, match="a name of its own"):
        ClassifierPolicy(model, word_tokenizer())


def test_bad_rows_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda *args: said.append(args[0]))
    policy = tiny_classifier()
    policy.tokenizer.model_max_length = LONGEST
    for content, complaint in (
        (" ", "empty text"),
        (3.5, "give a text"),
        (float("nan"), "give a text"),
        (["a", "b", "c"], "give a text"),
        ("film " * LONGEST, f"18 tokens, and the model reads {LONGEST}"),
    ):
        with pytest.raises(UserError, match=complaint) as caught:
            policy.prompts([{"prompt": "a"}, {"prompt": content}], "prompt", 1)
        assert "prompt 1" in str(caught.value)
    assert said == [], "too long a text is said once"
    rows = [*ROWS[:2], {"prompt": "slow", "label": "superb"}]
    with pytest.raises(UserError, match=r"prompt 2 has the label 'superb'.*'bad', 'fine', 'good'"):
        run(folder, tmp_path / "run", data={"prompts": rows, "completion": "label"}, algorithm={"name": "raft"})


def test_labels_of_training_and_of_held_out_texts_must_be_the_same(folder: Path, tmp_path: Path) -> None:
    data = {"prompts": ROWS, "completion": "label"}

    def judged(rows: Sequence[dict[str, Any]], data: dict[str, Any] = data) -> ir.Run:
        held_out = {"texts": {"prompts": list(rows), "completion": "stars"}}
        likelihood = {"name": "likelihood"}
        return run(
            folder, tmp_path / "run", data=data, algorithm=likelihood, evaluate=held_out, train={"save_every": 1}
        )

    renamed = [{"prompt": row["prompt"], "stars": row["label"]} for row in ROWS]
    few = [row for row in renamed if row["stars"] != "bad"]
    with pytest.raises(UserError, match=r"evaluate\.texts has no row with the label bad: give it more rows"):
        judged(few)
    one = [row for row in ROWS if row["label"] == "good"]
    with pytest.raises(UserError, match=r"train has the one label 'good' in the column 'label': there is nothing"):
        judged(renamed, {"prompts": one, "completion": "label"})
    with pytest.raises(UserError, match=r"\(evaluate\.texts\) has the label 'fine', which training never sees"):
        judged([*renamed, {"prompt": "a film", "stars": "fine"}])
    assert judged(renamed).metrics[-1]["held_out/accuracy"] >= 0.0


def test_a_new_label_that_no_row_has_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    scratch = {"config": {**config, "intermediate_size": 8}, "labels": ["bad", "fine", "good"]}
    scratch["tokenizer"] = {"kind": "word", "minimum": 1}
    values = {"model": {"scratch": scratch}, "data": {"prompts": ROWS, "completion": "label"}}
    values |= {"algorithm": {"name": "likelihood"}, "out": str(tmp_path / "run")}
    with pytest.raises(UserError, match="name fine, which no row of the data has in its column 'label': leave that"):
        ir.train(Config.build(values), rewards=[])
    scratch["labels"] = ["bad", "good"]
    values["train"] = {"steps": 1}
    assert ir.train(Config.build(values), rewards=[]).step == 1


def test_a_decision_about_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    given = {"completion": "label", "column": None}
    with pytest.raises(UserError, match=r"data\.column: a decision is about something"):
        run(folder, tmp_path / "run", data=given, algorithm={"name": "likelihood"})


def test_texts_are_cut_off_where_that_is_asked_for() -> None:
    policy = tiny_classifier()
    (prompt,) = policy.prompts([{"prompt": "film " * 40}], "prompt", 1, most=10)
    assert prompt.context is not None
    assert len(prompt.context[0]) == 10
    assert prompt.context[0][-1] == 2  # [SEP] is kept
    (pair,) = policy.prompts([{"prompt": ["a", "film " * 40]}], "prompt", 1, most=10)
    assert pair.context is not None
    assert pair.context[1] == [0, 0, 0, *[1] * 7]


def test_two_columns_make_a_pair(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("one,other,label\na film,the film,good\nslow,a joy,bad\n")
    config = Config.build({"data": {"path": str(file), "column": ["one", "other"]}})
    rows = assemble.load_prompt_rows(config.data)
    prompts = tiny_classifier().prompts(rows, "prompt", 1)
    assert prompts[0].text == "a film\nthe film"
    assert prompts[0].context is not None
    assert prompts[0].context[1] == [0, 0, 0, 0, 1, 1, 1]
    assert prompts[1].info["label"] == "bad"
    wrong = Config.build({"data": {"path": str(file), "column": ["one", "another"]}})
    with pytest.raises(UserError, match="another"):
        assemble.load_prompt_rows(wrong.data)


def test_a_critic_of_another_model_needs_the_same_labels(folder: Path, tmp_path: Path) -> None:
    twin = classifier_folder(tmp_path / "twin")
    run(folder, tmp_path / "run", algorithm={"name": "a2c", "critic": {"model": str(twin)}})
    other = classifier_folder(tmp_path / "other", labels=["no", "yes", "maybe"])
    with pytest.raises(UserError, match=r"algorithm\.critic\.model.*other labels"):
        run(folder, tmp_path / "refused", algorithm={"name": "a2c", "critic": {"model": str(other)}})


def test_recorded_decisions_come_back(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "first", train={"samples": "all"})
    samples = tmp_path / "first" / "samples.jsonl"
    assert json.loads(samples.read_text().splitlines()[0])["prompt"]["context"][0][0] == 1
    given = {"prompts": None, "rollouts": str(samples)}
    done = run(folder, tmp_path / "second", data=given, algorithm={"name": "vtrace"})
    assert "effective_sample_size" in done.metrics[0]


def test_an_adapter_learns_beside_the_output_layer_and_nothing_else_does(folder: Path, tmp_path: Path) -> None:
    lora = {"rank": 2, "alpha": 4}
    options: dict[str, Any] = {"model": {"lora": lora}, "algorithm": {"name": "ppo", "kl": 0.1}}
    done = run(folder, tmp_path / "run", **options)
    before = dict(ir.load_policy(str(folder), lora=lora).model.named_parameters())
    learned = {name for name, one in done.policy.model.named_parameters() if one.requires_grad}
    for name, weight in done.policy.model.named_parameters():
        assert torch.equal(weight, before[name]) != (name in learned) or "lora_A" in name, name
    assert {name for name in learned if "lora_" not in name} == {"classifier.weight", "classifier.bias"}
    assert any("lora_" in name for name in learned)
    assert abs(done.metrics[0]["kl"]) < 1e-6
    assert abs(done.metrics[-1]["kl"]) > 1e-4
    merged = ir.load_policy(str(done.policy.save(tmp_path / "merged")))
    assert isinstance(merged, ClassifierPolicy)
    assert not any("lora_" in name for name, _ in merged.model.named_parameters())
    ids = merged.prompts([{"prompt": "the film was great"}], "prompt", 1)[0].context
    asked = {"token_ids": [[2]], "mask": [[1]], "contexts": [ids]}
    assert torch.allclose(merged.logprobs(**asked), done.policy.logprobs(**asked), atol=1e-5)
    assert not torch.allclose(merged.logprobs(**asked), ir.load_policy(str(folder)).logprobs(**asked), atol=1e-3)


def test_of_an_adapter_the_reference_is_the_model_as_it_began(folder: Path) -> None:
    """The adapter is switched off, and the output layer is what it was; once it is reset, both are as they are then."""
    policy = ir.load_policy(str(folder), "float64", lora={"rank": 2})
    base = ir.load_policy(str(folder), "float64")
    policy.prepare(Optimization(learning_rate=1e-2, steps=9), Needs(reference=True))
    batch = collate(policy.sample(["the film was great", "slow"], per_prompt=3), dtype=torch.float64)

    def steps() -> None:
        for _ in range(3):
            policy.backward(-policy(batch).logprobs.sum())
            policy.step()

    steps()
    expected = base(batch).logprobs.detach()
    found = policy.annotate(batch).ref_logprobs
    assert policy.reference is None, "the base is there already: no copy of it"
    assert found is not None
    assert torch.allclose(found, expected, atol=1e-12)
    now = policy(batch).logprobs.detach()
    assert float((now - expected).abs().max()) > 1e-3
    policy.reset_reference()
    steps()
    found = policy.annotate(batch).ref_logprobs
    assert found is not None
    assert torch.allclose(found, now, atol=1e-12)
    assert float((policy(batch).logprobs.detach() - now).abs().max()) > 1e-3


def test_new_labels_take_an_adapter_and_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    """What is drawn for them is kept with the run; it is trained in full, as all that lies behind the encoder."""
    torch.manual_seed(1)
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 16}
    folder = tmp_path / "encoder"
    DistilBertModel(DistilBertConfig(vocab_size=14, **sizes)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    model = {"name": str(folder), "labels": ["bad", "good"], "lora": {"rank": 2}}
    options: dict[str, Any] = {"model": model, "algorithm": {"name": "rloo", "kl": 0.01}}
    whole = run(folder, tmp_path / "whole", 6, **options)
    learned = {name for name, one in whole.policy.model.named_parameters() if one.requires_grad and "lora" not in name}
    assert learned == {f"{name}.{what}" for name in ("pre_classifier", "classifier") for what in ("weight", "bias")}
    run(folder, tmp_path / "half", 3, **options)
    resumed = run(folder, tmp_path / "half", 6, resume=True, **options)
    assert plain(resumed.metrics) == plain(whole.metrics)
    for name, one in whole.policy.model.named_parameters():
        if one.requires_grad:
            assert torch.equal(one, dict(resumed.policy.model.named_parameters())[name]), name


@pytest.mark.parametrize("targets", ["classifier", ["nothing"]])
def test_an_adapter_that_would_fit_nothing_is_refused(folder: Path, targets: Any) -> None:
    with pytest.raises(UserError, match=r"model\.lora\.targets: .* fits no layer"):
        ir.load_policy(str(folder), lora={"rank": 2, "targets": targets})
