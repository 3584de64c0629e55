"""Models with new weights: built by plain values, and trained, saved, loaded and resumed like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig

import instant_reward as ir
from instant_reward.cli import main
from instant_reward.config import Config
from instant_reward.config_scratch import ScratchConfig
from instant_reward.policies.masked import MaskedPolicy
from instant_reward.policies.scratch import CLASSES, build_model
from instant_reward.policies.seq2seq import Seq2SeqPolicy
from instant_reward.start import load_run_policy, start_policy
from tiny import shared_tokenizer

TEXTS = [
    "the movie was good and long",
    "the movie was bad, but not slow!",
    "这部电影很好看。",
    "a fine movie of the sea",
] * 3
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
GPT2 = {"model_type": "gpt2", **SMALL}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
BERT = {"model_type": "bert", "intermediate_size": 16, **SMALL}


def scratch(config: dict[str, Any], seed: int = 0, **tokenizer: Any) -> ScratchConfig:
    options = {"kind": "word", "vocabulary": 300, **tokenizer}
    return ScratchConfig(config=config, tokenizer=options, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (GPT2, {"kind": "bpe"}),
        (GPT2, {"kind": "wordpiece"}),
        ({"model_type": "llama", "num_key_value_heads": 1, "intermediate_size": 16, **SMALL}, {"kind": "character"}),
        ({"model_type": "qwen2", "num_key_value_heads": 1, "intermediate_size": 16, **SMALL}, {"kind": "bpe"}),
    ],
)
def test_the_tokenizer_fills_in_the_config(config: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer = build_model(scratch(config, **options), TEXTS)
    assert type(model) in AutoModelForCausalLM._model_mapping.values()
    assert model.config.vocab_size == len(tokenizer) == model.get_output_embeddings().weight.shape[0]
    ids = (model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id)
    assert ids == (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert (model.config.hidden_size, tokenizer.model_max_length) == (16, 64)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS[1])["input_ids"] == tokenizer(TEXTS[1])["input_ids"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    assert torch.equal(again(input_ids=inputs).logits, model(input_ids=inputs).logits)


def test_the_seed_draws_the_weights_and_nothing_else_does() -> None:
    before = torch.get_rng_state()
    one, same, other = (build_model(scratch(GPT2, seed), TEXTS)[0] for seed in (1, 1, 2))
    weights = [model.get_output_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_kinds_of_models() -> None:
    model, tokenizer = build_model(scratch(T5), TEXTS, "seq2seq")
    assert type(model).__name__ == "T5ForConditionalGeneration"
    assert model.config.decoder_start_token_id == tokenizer.bos_token_id
    assert tokenizer(TEXTS[0])["input_ids"][-1] == tokenizer.eos_token_id
    model, tokenizer = build_model(scratch(BERT), TEXTS, "classification", ["bad", "good", "neither"])
    assert (model.config.num_labels, model.config.label2id["good"]) == (3, 1)
    pair = tokenizer("the movie", " was good", return_tensors="pt")
    assert pair["token_type_ids"].unique().tolist() == [0, 1]
    assert model(**pair).logits.shape == (1, 3)
    model, tokenizer = build_model(scratch(BERT), TEXTS, "masked")
    assert type(model).__name__ == "BertForMaskedLM"
    assert tokenizer.mask_token_id is not None
    roberta = {"model_type": "roberta", "type_vocab_size": 1, "intermediate_size": 16, **SMALL}
    model, tokenizer = build_model(scratch(roberta), TEXTS, "classification", ["a", "b"])
    pair = tokenizer("the movie", " was good", return_tensors="pt")
    assert model(**pair).logits.shape == (1, 2), "it knows no types of tokens"


def test_a_tokenizer_from_a_folder(tmp_path: Path) -> None:
    shared_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = build_model(
        ScratchConfig.model_validate({"config": GPT2, "tokenizer": {"folder": str(tmp_path)}}), []
    )
    assert model.config.vocab_size == len(shared_tokenizer())
    assert tokenizer.get_vocab() == shared_tokenizer().get_vocab()
    with pytest.raises(ir.UserError, match=r"model\.scratch\.tokenizer\.folder: there is no tokenizer in"):
        build_model(ScratchConfig.model_validate({"config": GPT2, "tokenizer": {"folder": str(tmp_path / "no")}}), [])


@pytest.mark.parametrize(
    ("config", "options", "kind", "message"),
    [
        ({"model_type": "gtp2"}, {}, "causal", r"config\.model_type: transformers knows no 'gtp2': did you mean gpt2"),
        (GPT2 | {"hiden_size": 3}, {}, "causal", r"config\.hiden_size: .* no such key: did you mean hidden_size\?"),
        (GPT2 | {"zzz": 3}, {}, "causal", r"config\.zzz: the config of gpt2 has no such key: it has activation"),
        (GPT2 | {"vocab_size": 3}, {}, "causal", r"config\.vocab_size: the tokenizer says what it is: leave it out"),
        (GPT2 | {"eos_token_id": 3}, {}, "causal", r"config\.eos_token_id: the tokenizer says"),
        ({"model_type": "gpt2", "n_embd": "x"}, {}, "causal", r"these values make no gpt2 config \(.*n_embd.*expected"),
        (GPT2 | {"hidden_size": 15}, {}, "causal", r"no gpt2 model can be built .*divisible"),
        ({"model_type": "qwen2", **SMALL}, {"kind": "bpe"}, "causal", r"qwen2 model of these values does not run"),
        (GPT2, {}, "masked", r"gpt2 has no model of the kind masked"),
        (BERT | {"edits": 1}, {}, "masked", r"config\.edits: 1 must be true or false"),
        (BERT | {"edits": True}, {}, "causal", r"config\.edits: the config of bert has no such key"),
        (T5, {}, "causal", r"t5 has no model of the kind causal"),
        (
            {"model_type": "qwen2", "num_key_value_heads": 1, **SMALL},
            {"kind": "wordpiece"},
            "causal",
            r"tokenizer of every qwen2 model as its own Qwen2Tokenizer.*take tokenizer\.kind bpe",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(config: Any, options: Any, kind: Any, message: str) -> None:
    with pytest.raises(ir.UserError, match=message):
        build_model(scratch(config, **options), TEXTS, kind)


def test_a_model_that_reads_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT as a causal model is built so that it does not; a model that does all the same is found out."""
    assert build_model(scratch(BERT), TEXTS)[0].config.is_decoder
    monkeypatch.setitem(CLASSES, "causal", "AutoModelForMaskedLM")
    monkeypatch.setattr(
        "transformers.AutoConfig.for_model", lambda _, **values: BertConfig(**values | {"is_decoder": False})
    )
    with pytest.raises(ir.UserError, match="a bert model reads the tokens that follow"):
        build_model(scratch(BERT), TEXTS)


# In a run


def length(text: str) -> float:
    return float(len(text))


def run_config(out: Path, **changes: Any) -> Config:
    values = {
        "model": {"scratch": {"config": GPT2, "tokenizer": {"kind": "word", "minimum": 1}, "seed": 3}},
        "data": {"prompts": TEXTS[:4]},
        "sampling": {"max_new_tokens": 4},
        "train": {"steps": 4, "prompts_per_step": 2, "group_size": 3, "learning_rate": 0.01, "save_every": 2},
        "out": str(out),
    }
    return Config.build(values | changes)


def test_a_run_from_scratch_is_saved_loaded_and_resumed(tmp_path: Path) -> None:
    whole = ir.train(run_config(tmp_path / "whole"), rewards=[length])
    half = run_config(tmp_path / "half")
    first = half.model_copy(update={"train": half.train.model_copy(update={"steps": 2})})
    ir.train(first, rewards=[length])
    resumed = ir.train(half, rewards=[length], resume=True)
    assert [row["reward"] for row in resumed.metrics] == [row["reward"] for row in whole.metrics]
    for name, weight in whole.policy.model.state_dict().items():
        assert torch.equal(weight, resumed.policy.model.state_dict()[name]), name

    start = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "start")
    drawn, tokenizer = build_model(half.model.scratch, TEXTS[:4])  # type: ignore[arg-type]
    assert torch.equal(start.get_output_embeddings().weight, drawn.get_output_embeddings().weight)
    moved = (tmp_path / "whole").rename(tmp_path / "moved")
    policy, _ = load_run_policy(moved)
    assert policy.tokenizer.get_vocab() == tokenizer.get_vocab()
    trained = policy.model.get_output_embeddings().weight
    assert torch.equal(trained, whole.policy.model.get_output_embeddings().weight)
    assert not torch.equal(trained, start.get_output_embeddings().weight)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "recurrent", "cell": "gru", "hidden_size": 16, "num_hidden_layers": 1},
        {"model_type": "transformer", **SMALL},
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_the_librarys_own_models_begin_anew_too(config: dict[str, Any], tmp_path: Path) -> None:
    model = {"scratch": {"config": config, "tokenizer": {"kind": "wordpiece", "minimum": 1}}}
    data = {"prompts": TEXTS[:4], "split": {"train": 0.5, "test": 0.5}}
    held_out = {"prompts": {**data, "part": "test"}}
    whole = ir.train(run_config(tmp_path / "run", model=model, data=data, evaluate=held_out), rewards=[length])
    policy, _ = load_run_policy(tmp_path / "run")
    for name, weight in whole.policy.model.state_dict().items():
        assert torch.equal(weight, policy.model.state_dict()[name]), name
    with pytest.raises(
        ir.UserError, match=rf"config\.hiden_size: the config of {config['model_type']} has no such key"
    ):
        build_model(scratch({**config, "hiden_size": 3}), TEXTS)
    with pytest.raises(ir.UserError, match=r"config\.others: .* no such key"):
        build_model(scratch({**config, "others": 3}), TEXTS)


def test_an_encoder_decoder_is_fitted_to_pairs_and_then_learns_from_a_reward(tmp_path: Path) -> None:
    rows = [{"prompt": text, "answer": text[::-1]} for text in TEXTS[:4]]
    model = {"scratch": {"config": T5, "tokenizer": {"kind": "bpe", "columns": ["answer"]}}}
    data = {"prompts": rows, "completion": "answer"}
    config = run_config(tmp_path / "fit", model=model, data=data, algorithm="likelihood")
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 12, "group_size": 1})})
    fitted = ir.train(config)
    assert type(fitted.policy) is Seq2SeqPolicy
    nll = [row["nll"] for row in fitted.metrics]
    assert nll[-1] < nll[0]
    policy, _ = load_run_policy(tmp_path / "fit")
    assert type(policy) is Seq2SeqPolicy
    for name, weight in fitted.policy.model.state_dict().items():
        assert torch.equal(weight, policy.model.state_dict()[name]), name
    steered = ir.train(run_config(tmp_path / "steered", model=model, data={"prompts": rows}), rewards=[length])
    assert len(steered.metrics) == 4


def test_the_command_judges_it_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out figures before training are those of the weights as they were drawn."""
    file = tmp_path / "reviews.csv"
    file.write_text("review,n\n" + "".join(f'"{text}",{n}\n' for n, text in enumerate(TEXTS[:4] * 3)), encoding="utf-8")
    data = {"path": str(file), "columns": {"prompt": "review"}, "split": {"train": 0.5, "test": 0.5}}
    (tmp_path / "rules.py").write_text("def length(text):\n    return float(len(text))\n")
    values = run_config(tmp_path / "run").model_dump(mode="json")
    values |= {
        "data": data,
        "rewards": [f"{tmp_path}/rules.py:length"],
        "evaluate": {"prompts": {**data, "part": "test"}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "run.yaml"), "train.steps=2"]) == 0
    assert "reference perplexity" in capsys.readouterr().out
    before, after = (
        json.loads((tmp_path / "run" / "held_out" / f"{name}.json").read_text()) for name in ("before", "after")
    )
    assert len(before["rollouts"]) == 6
    assert before["rollouts"] != after["rollouts"]
    assert main(["train", "--resume", str(tmp_path / "run"), "train.steps=3"]) == 0
    assert main(["sample", str(tmp_path / "run"), "the movie", "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("kind", ["wordpiece", "character"])
def test_a_masked_model_begins_anew_too(kind: str, edits: bool, tmp_path: Path) -> None:
    values = {"kind": "masked", "config": {**BERT, "edits": edits}, "tokenizer": {"kind": kind, "minimum": 1}}
    data = {"prompts": ["the movie was <mask> and <mask>", "a <mask>"]}
    config = run_config(tmp_path / "run", model={"scratch": values}, data=data)
    run = ir.train(config, rewards=[length])
    assert isinstance(run.policy, MaskedPolicy)
    policy, _ = load_run_policy(tmp_path / "run")
    assert isinstance(policy, MaskedPolicy)
    assert policy.slots.edits == edits
    assert torch.equal(policy.model.order.weight, run.policy.model.order.weight)
    for name, weight in run.policy.model.state_dict().items():
        assert torch.equal(weight, policy.model.state_dict()[name]), name
    start = ir.load_policy(str(tmp_path / "run" / "start"))
    assert isinstance(start, MaskedPolicy)
    assert not start.model.order.weight.any()
    ids = policy.tokenizer("the movie was <mask> and")["input_ids"]
    space = policy.tokenizer.convert_ids_to_tokens(ids)[ids.index(policy.slots.mask) - 1] == " "
    assert space == (kind == "character"), "a space is part of the word behind it, and so of the mask in its place"


def test_a_resumed_run_keeps_its_tokenizer_whatever_became_of_the_data(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    config = run_config(tmp_path / "run", data={"path": str(file)})
    first = config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})})
    vocab = ir.train(first, rewards=[length]).policy.tokenizer.get_vocab()
    file.write_text("the movie\na sea", encoding="utf-8")
    assert ir.train(config, rewards=[length], resume=True).policy.tokenizer.get_vocab() == vocab


def test_the_tokenizer_reads_prompts_messages_completions_or_what_is_named(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "alpha"}], "answer": "beta", "notes": "gamma"},
        {"prompt": "delta", "answer": "beta", "notes": "gamma"},
    ]

    def words(**changes: Any) -> set[str]:
        tokenizer = {"kind": "word", "minimum": 1, **changes}
        config = run_config(tmp_path / "run", model={"scratch": {"config": GPT2, "tokenizer": tokenizer}})
        data = config.data.model_copy(update={"completion": "answer"})
        policy = start_policy(config.model_copy(update={"data": data}), tmp_path / "run", rows)
        return {token for token in policy.tokenizer.get_vocab() if not token.startswith("<")}

    assert words() == {"alpha", "beta", "delta"}
    assert words(columns=["notes"]) == {"gamma"}
    with pytest.raises(ir.UserError, match="has no column 'other'"):
        words(columns=["other"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "gpt2", "scratch": {"config": GPT2}}, r"model: name and scratch are two models"),
        ({"scratch": {"config": GPT2}, "lora": {}}, r"model: an adapter would leave the new weights"),
        ({"scratch": {"config": {}}}, r"model\.scratch\.config: needs a model_type"),
        ({"scratch": {}}, r"model\.scratch\.config: this is required"),
        ("scratch", r"model: the name scratch is for models with new weights"),
        ({"scratch": {"config": GPT2, "tokenizer": "bpo"}}, r"model\.scratch\.tokenizer\.kind: .*not 'bpo'"),
        ({"scratch": {"config": GPT2, "tokenizer": {"folder": "a", "lower": True}}}, r"tokenizer: .*taken as it is"),
        ({"scratch": {"config": GPT2, "tokenizer": {"stop_words": ["a"]}}}, r"stop_words are left out by kind word"),
        ({"scratch": {"config": BERT, "kind": "masked", "labels": ["a", "b"]}}, r"leave out kind or labels"),
        ({"scratch": {"config": BERT, "kind": "maskd"}}, r"model\.scratch\.kind: "),
        ({"scratch": {"config": GPT2, "sed": 1}}, r"model\.scratch\.sed: .*did you mean seed\?"),
    ],
)
def test_a_config_that_contradicts_itself_is_named(model: Any, message: str) -> None:
    with pytest.raises(ir.UserError, match=message):
        Config.build({"model": model, "data": {"prompts": ["a"]}})


def test_the_config_comes_back_from_its_dump(tmp_path: Path) -> None:
    config = run_config(tmp_path, model={"scratch": {"config": GPT2, "tokenizer": {"folder": "somewhere"}}})
    (tmp_path / "config.yaml").write_text(config.dump())
    assert config.model.name == "scratch"
    assert Config.load(tmp_path / "config.yaml", ["rewards=[m:f]"]).model == config.model
    rollouts = {"rollouts": "samples.jsonl"}
    with pytest.raises(ir.UserError, match="data: rollouts are tokens of another model"):
        run_config(tmp_path, data=rollouts)
