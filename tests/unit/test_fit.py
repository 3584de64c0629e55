"""Supervised training end to end on a tiny model: texts, prompts and answers, held-out figures, ends, resumes."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import instant_reward as ir
from instant_reward import cli
from instant_reward.config import Config, as_supervised
from instant_reward.fitting import HeldOutTexts, Texts, TokenBatches
from instant_reward.rewards.base import as_reward
from instant_reward.start import load_run_policy
from instant_reward.stored import on_disk
from instant_reward.train import prepare
from instant_reward.types import UserError
from instant_reward.watching import OF_TEXTS
from tiny import tiny_folder
from what_counts import plain, weights

TEXTS = [
    "the movie was good", "the movie was bad and slow", "a fine movie but long", "it was not good",
    "the movie was long and slow", "a good one of a kind",
]  # fmt: skip
PAIRS = [{"question": f"is {text}?", "answer": "good" if "good" in text else "bad"} for text in TEXTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


def config(model: Path, out: Path, data: Any = None, **sections: Any) -> Config:
    values = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"prompts": [{"text": text} for text in TEXTS]} if data is None else data,
        "train": {"steps": 6, "learning_rate": 3e-3, **sections.pop("train", {})},
        "out": str(out),
        **sections,
    }
    return Config.build(as_supervised(values))


def test_texts_alone_are_learned(model: Path, tmp_path: Path) -> None:
    run = ir.fit(
        model=str(model), texts=TEXTS, held_out=TEXTS, every=5, steps=20, learning_rate=5e-3, out=tmp_path / "run"
    )
    assert [row["step"] for row in run.metrics if "held_out/nll" in row] == [5, 10, 15, 20]
    assert run.metrics[-1]["held_out/nll"] < 0.5 * run.metrics[4]["held_out/nll"]
    assert "reward" not in run.metrics[0]
    first = run.samples()[0]
    assert first["text"] in TEXTS
    assert first["mask"] == [False, *[True] * (len(first["mask"]) - 1)]
    assert first["token_ids"][0] == first["token_ids"][-1] == run.policy.tokenizer.eos_token_id


def test_prompts_are_no_targets(model: Path, tmp_path: Path) -> None:
    data = {"prompts": PAIRS, "column": "question", "completion": "answer"}
    run = ir.fit(config(model, tmp_path / "run", data, train={"steps": 30, "learning_rate": 5e-3}))
    (text,) = run.policy.sample([PAIRS[1]["question"]], max_new_tokens=4, temperature=0.0)
    assert text.text == "bad"
    sample = run.samples()[0]
    prompt = len(run.policy.tokenizer(sample["prompt"]["text"])["input_ids"])
    assert sample["mask"] == [False] * prompt + [True] * (len(sample["mask"]) - prompt)


def test_held_out_figures_are_those_of_a_direct_computation(model: Path, tmp_path: Path) -> None:
    """perplexity = exp(-(1 / N) sum log p), bits = -sum log2 p / characters, over every token and each end."""
    job = prepare(config(model, tmp_path / "run", evaluate={"texts": {"prompts": [{"text": text} for text in TEXTS]}}))
    assert isinstance(job.held_out, HeldOutTexts)
    found = job.held_out.measure(job.policy)
    assert tuple(found) == OF_TEXTS
    total, count, right = 0.0, 0, 0
    end = job.policy.tokenizer.eos_token_id
    for text in TEXTS:
        ids = [end, *job.policy.tokenizer(text)["input_ids"], end]
        with torch.no_grad():
            logprobs = job.policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for t in range(1, len(ids)):
            total -= float(logprobs[t - 1, ids[t]])
            right += int(logprobs[t - 1].argmax()) == ids[t]
            count += 1
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["nll"] == pytest.approx(total / count, rel=1e-4)
    assert found["bits_per_character"] == pytest.approx(total / math.log(2) / sum(map(len, TEXTS)), rel=1e-4)
    assert found["accuracy"] == right / count


def test_epochs_count_passes(model: Path, tmp_path: Path) -> None:
    run = ir.fit(config(model, tmp_path / "texts", train={"steps": 40, "epochs": 2, "prompts_per_step": 4}))
    assert run.step == 3
    fifty = {"prompts": [{"text": f"the movie {number}"} for number in range(50)]}
    assert prepare(config(model, tmp_path / "part", fifty, train={"epochs": 1.1, "steps": 40})).steps == 14
    one = {"epochs": 1.1, "steps": 40, "prompts_per_step": 1}
    assert prepare(config(model, tmp_path / "one", fifty, train=one)).steps == 55, "1.1 times 50 is 55.00000000000001"
    job = prepare(config(model, tmp_path / "tokens", train={"steps": 40, "epochs": 2, "tokens_per_step": 12}))
    seen = [rollout.text for step in range(1, job.steps + 1) for (rollout,) in job.texts.groups(None, step)]
    assert sorted(seen) == sorted(2 * TEXTS)


def test_the_pages_commands_are_of_configs_that_there_are() -> None:
    """Each ``instant-reward fit`` of the page, with the recipe and the changes that it names."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "supervised.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [
        shlex.split(line, comments=True)[2:] for line in page.splitlines() if line.startswith("instant-reward fit")
    ]
    named = [[word for word in words if "=" in word] for words in commands if words[0].startswith("recipes/")]
    assert sorted(named[:2]) == [[], ["train.steps=null", "train.epochs=2"]]
    for words, changes in zip([one for one in commands if one[0].startswith("recipes/")], named, strict=True):
        loaded = Config.load(root / words[0], changes, supervised=True)
        assert loaded.algorithm.name == "likelihood"
    assert (loaded.model.max_context, loaded.data.too_long) == (512, "refuse")


def test_batches_by_tokens_hold_texts_of_like_length() -> None:
    """Each epoch has every text once; batches stay within the bound; the order hangs on seed and step alone."""
    lengths = [(7 * number) % 50 + 1 for number in range(300)]
    batches = TokenBatches(lengths, 100, seed=3)
    steps = batches.steps(1)
    epoch = [batches.batch(step) for step in range(1, steps + 1)]
    assert sorted(number for batch in epoch for number in batch) == list(range(300))
    assert all(sum(lengths[number] for number in batch) <= 100 for batch in epoch)
    assert all(max(lengths[n] for n in batch) - min(lengths[n] for n in batch) <= 12 for batch in epoch)
    assert [max(lengths[n] for n in batch) for batch in epoch] != sorted(max(lengths[n] for n in b) for b in epoch)
    again = TokenBatches(lengths, 100, seed=3)
    later = steps + 5
    assert again.batch(later) == batches.batch(later), "a resumed run asks for its next step at once"
    assert again.batch(later) != epoch[4], "another epoch has another order"
    assert TokenBatches([500, 3], 100, 0).steps(1) == 2, "what is too long stands alone"


@pytest.mark.parametrize("options", [{}, {"schedule": "cosine"}, {"tokens_per_step": 20}])
def test_a_resumed_run_is_the_unbroken_one(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Bit for bit, with a reward on the texts, error weights and a patience that goes on counting."""
    stop = {"metric": "held_out/perplexity", "patience": 4, "return_to_best": True}

    def made(name: str) -> Config:
        return config(
            model,
            tmp_path / name,
            algorithm={"by_error": "harder"},
            train={"save_every": 3, "steps": 7, "stop_when": stop, **options},
            evaluate={"texts": {"prompts": [{"text": text} for text in TEXTS[:2]]}, "every": 1},
        )

    unbroken = ir.fit(made("unbroken"), rewards=[length_of])
    whole = made("killed")
    job = prepare(whole, [length_of])
    from instant_reward.screen import Screen
    from instant_reward.train import learn

    def killed(policy: ir.Policy, step: int) -> dict[str, float]:
        if step == 5:
            raise InterruptedError
        return {}

    with Screen(7) as screen, pytest.raises(InterruptedError):
        learn(job, screen, killed)
    again = prepare(whole, [length_of], resume=True)
    assert again.course.best == min(row["held_out/perplexity"] for row in again.run.metrics), "it goes on counting"
    resumed = ir.fit(whole, rewards=[length_of], resume=True)
    assert plain(resumed.metrics) == plain(unbroken.metrics)
    assert weights(resumed) == weights(unbroken)


@pytest.mark.parametrize("options", [{}, {"tokens_per_step": 20}])
def test_a_streamed_run_is_the_one_in_memory(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: tokenizer, weights and figures, of a file whose rows, prompts and texts lie on disk."""
    monkeypatch.setattr("instant_reward.collect.AT_ONCE", 2)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in [*PAIRS, *PAIRS[:2]]))
    scratch = {"config": {"model_type": "transformer", "hidden_size": 16, "num_hidden_layers": 1}}
    scratch["tokenizer"] = {"kind": "word", "vocabulary": 60, "minimum": 1}

    def made(name: str, stream: bool) -> Config:
        data = {"path": str(file), "column": "question", "completion": "answer", "unique": "question"}
        parts = {"split": {"train": 0.7, "test": 0.3}, "stream": stream}
        held_out = {"every": 3, "texts": {**data, **parts, "part": "test"}}
        values = {"model": {"scratch": scratch}, "data": {**data, **parts, "too_long": "split"}, "evaluate": held_out}
        values |= {"train": {"epochs": 3, "learning_rate": 3e-3, **options}, "out": str(tmp_path / name)}
        return Config.build(as_supervised(values))

    plainly, streamed = (ir.fit(made(name, name == "s"), rewards=[length_of]) for name in ("p", "s"))
    assert plain(streamed.metrics) == plain(plainly.metrics)
    assert weights(streamed) == weights(plainly)
    texts = prepare(made("again", True)).texts
    assert isinstance(texts, Texts)
    assert on_disk(texts.rollouts.texts)  # type: ignore[attr-defined]
    assert texts.rollouts[3].id == prepare(made("other", False)).texts.rollouts[3].id  # type: ignore[union-attr]


def test_sampled_texts_come_from_streamed_prompts_too(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))

    def made(stream: bool) -> Config:
        values: dict[str, Any] = {"path": str(tmp_path / "a.txt"), "stream": stream}
        sections = {
            "data": values,
            "model": {"name": str(model), "dtype": "float32"},
            "out": str(tmp_path / str(stream)),
        }
        return Config.build(
            {**sections, "sampling": {"max_new_tokens": 4}, "train": {"steps": 4, "prompts_per_step": 2}}
        )

    runs = [ir.train(made(stream), rewards=[length_of]) for stream in (False, True)]
    assert plain(runs[0].metrics) == plain(runs[1].metrics)
    assert [one["prompt"] for one in runs[0].samples()] == [one["prompt"] for one in runs[1].samples()]
    given = Config.build({"data": {"prompts": PAIRS, "completion": "answer", "column": "question", "stream": True}})
    given.algorithm.name = "awr"
    with pytest.raises(UserError, match=r"data\.stream: awr puts given texts of one prompt together"):
        prepare(given.model_copy(update={"out": str(tmp_path / "x")}), [length_of])


def length_of(text: str) -> float:
    return len(text) / 10


def test_dropout_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    """A model with dropout draws from torch's random numbers, whose state a checkpoint holds."""
    folder = tmp_path / "dropout"
    tiny_folder(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "attention_dropout": 0.3}))
    unbroken = ir.fit(config(folder, tmp_path / "unbroken", train={"steps": 4}))
    ir.fit(config(folder, tmp_path / "again", train={"steps": 2}))
    resumed = ir.fit(config(folder, tmp_path / "again", train={"steps": 4}), resume=True)
    assert weights(resumed) == weights(unbroken)
    without = ir.fit(config(model, tmp_path / "without", train={"steps": 4}))
    assert weights(without) != weights(unbroken)


def test_training_ends_at_its_target(model: Path, tmp_path: Path) -> None:
    """``for`` counts measurements: the steps between them neither count nor begin anew."""
    run = ir.fit(
        config(
            model,
            tmp_path / "run",
            train={"steps": 200, "stop_when": {"metric": "held_out/accuracy", "above": 0.6, "for": 3}},
            evaluate={"texts": {"prompts": [{"text": text} for text in TEXTS]}, "every": 2},
        )
    )
    measured = [row["held_out/accuracy"] for row in run.metrics if "held_out/accuracy" in row]
    assert run.step < 200
    assert all(value > 0.6 for value in measured[-3:])
    assert not all(value > 0.6 for value in measured[-4:])
    below = {"metric": "nll", "below": 3.0}
    run = ir.fit(config(model, tmp_path / "below", train={"steps": 200, "stop_when": below}))
    assert run.metrics[-1]["nll"] < 3.0 <= run.metrics[-2]["nll"]


def test_patience_ends_a_run_that_gets_no_better_and_returns_to_the_best(model: Path, tmp_path: Path) -> None:
    held_out = {"prompts": [{"text": "it!it!it! of of of"}]}  # what is learned makes this text less likely
    run = ir.fit(
        config(
            model,
            tmp_path / "run",
            train={
                "steps": 200,
                "learning_rate": 2e-2,
                "stop_when": {"metric": "held_out/perplexity", "patience": 3, "return_to_best": True},
                "keep": 1,
            },
            evaluate={"texts": held_out, "every": 1},
        )
    )
    values = [row["held_out/perplexity"] for row in run.metrics]
    best = values.index(min(values)) + 1
    assert run.step == best + 3
    assert run.metrics[-1]["returned_to"] == best
    judge = HeldOutTexts(run.config.evaluate.texts, run.policy)
    assert judge.measure(run.policy)["perplexity"] == pytest.approx(min(values), rel=1e-6)
    reloaded, _ = load_run_policy(run.path)
    assert judge.measure(reloaded)["perplexity"] == pytest.approx(min(values), rel=1e-6)


def test_a_run_that_has_ended_by_its_target_does_not_go_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed, it is what it was; with another target it goes on, from the best policy and that one's optimizer."""
    held_out = {"texts": {"prompts": [{"text": "it!it!it! of of of"}]}, "every": 1}
    stop = {"metric": "held_out/perplexity", "patience": 3, "return_to_best": True}
    train = {"steps": 30, "learning_rate": 2e-2, "stop_when": stop}
    run = ir.fit(config(model, tmp_path / "run", train=train, evaluate=held_out))
    assert run.step < 30
    again = ir.fit(run.config, resume=True)
    assert again.metrics == run.metrics
    assert cli.main(["fit", "--resume", str(run.path)]) == 0
    assert f"has its {run.step} steps already; its train.stop_when has ended it" in " ".join(
        capsys.readouterr().out.split()
    )
    best = run.checkpoint(int(run.metrics[-1]["returned_to"]))
    assert best is not None
    job = prepare(run.config, resume=True)
    assert job.policy.stepper is not None
    moments = torch.load(best / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    for number, state in job.policy.stepper.optimizer.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], moments[number]["exp_avg"])
    assert job.policy.stepper.done == run.step, "the schedule is not set back"
    longer = config(model, run.path, train={**train, "stop_when": {**stop, "patience": 5}}, evaluate=held_out)
    assert ir.fit(longer, resume=True).step > run.step


def test_a_reward_on_data_is_a_weight_and_is_logged(model: Path, tmp_path: Path) -> None:
    def overlap(output: str, target: str) -> float:
        return 1.0 + sum(a == b for a, b in zip(output, target, strict=False)) / len(target)

    rated = ir.fit(config(model, tmp_path / "rated", algorithm={"by_error": "easier"}), rewards=[overlap])
    row = rated.metrics[-1]
    assert row["reward/overlap"] == row["reward"] > 1.0
    assert 0 < row["effective_targets"] < 1
    assert row["target_weight"] > 1.0
    assert "effective_sample_size" not in row
    assert "ratio_kl" not in row
    even = ir.fit(config(model, tmp_path / "plain"))
    assert even.metrics[-1]["effective_targets"] == even.metrics[-1]["target_weight"] == 1.0
    assert weights(even) != weights(rated)


def test_what_is_wrong_is_said(model: Path, tmp_path: Path) -> None:
    def problems(**values: Any) -> str:
        with pytest.raises(UserError) as caught:
            Config.build(as_supervised({"data": {"prompts": TEXTS}, **values}))
        return str(caught.value)

    said = problems(
        train={"steps": 3, "epochs": 2},
        algorithm={"by_error": {"first": "harder", "strength": {"rule": "linear", "start": -1.0, "steps": 3}}},
        supervised={"data": "a.txt", "weight": -1},
        evaluate={"texts": {"path": "a.txt", "column": "text", "completion": None}},
    )
    for line in (
        "train: epochs says how long the run is, and so does steps; give one of them (steps: null leaves it out)",
        "algorithm.by_error: strength must be 0 or more",
        "supervised.data: these are whole texts; name their column by completion",
        "supervised.weight: must be 0 or more at every step",
        "evaluate.texts: these are whole texts; name their column by completion",
    ):
        assert line in said
    assert "train: schedule: follow and the section follow go together" in problems(train={"schedule": "follow"})
    unknown = problems(algorithm={"by_error": {"first": "harder", "strength": {"rule": "fade"}}})
    assert "algorithm.by_error.strength: must be a number, or a mapping with rule" in unknown
    assert "data: column is None" in problems(data={"prompts": TEXTS, "completion": None})
    sampled = {"data": {"prompts": ["a"]}, "train": {"tokens_per_step": 5}}
    with pytest.raises(UserError, match=r"train\.tokens_per_step: is about given texts"):
        Config.build(sampled)
    with pytest.raises(UserError, match="fit learns by likelihood, and this is rloo"):
        ir.fit(Config.build({"data": {"prompts": ["a"]}}))
    with pytest.raises(UserError, match="likelihood learns from given texts, and none are given"):
        prepare(Config.build({"data": {"prompts": ["a"]}, "algorithm": "likelihood", "out": str(tmp_path / "x")}))
    with pytest.raises(UserError, match="'pair' compares a given text with what the policy would have written"):
        ir.train(model=str(model), prompts=["a"], rewards=[pair], out=tmp_path / "y")
    with pytest.raises(UserError, match=r"train\.prompts_per_step: 4 texts are too few for algorithm\.minibatches=5"):
        prepare(config(model, tmp_path / "shares", algorithm={"minibatches": 5}))
    with pytest.raises(UserError, match=r"data\.column: 'text' has the texts to learn from; leave it out"):
        prepare(config(model, tmp_path / "same", {"prompts": [{"text": "a"}], "column": "text"}))
    with pytest.raises(UserError, match="'pair' compares whole texts, which a piece of one is not; leave every out"):
        ir.fit(config(model, tmp_path / "every"), rewards=[as_reward(pair).but(every="word")])
    with pytest.raises(UserError, match=r"train\.stop_when\.metric: there is no metric 'accuracy'"):
        ir.fit(config(model, tmp_path / "z", train={"stop_when": {"metric": "accuracy", "above": 0.5}}))


def pair(output: str, target: str) -> float:
    return 1.0


pair.name = "pair"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "prompt 1 has an empty text in the column 'text'"),
        ({"text": float("nan")}, "prompt 1.*'text'"),
        ({"other": "a"}, "column"),
        ({"text": "the movie " * 100}, "tokens, prompt included, and the model reads 128"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(
    model: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ir.fit(config(model, tmp_path / "run", {"prompts": [{"text": "fine"}, row]}))
    assert not (tmp_path / "run").exists()


def test_rows_of_a_file_are_named_by_their_lines(model: Path, tmp_path: Path) -> None:
    """Also by the policy, whose actions they have to be."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "fine"}) + "\n\n" + json.dumps({"text": "the movie " * 100}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 3 has \d+ tokens, .*the model reads 128"):
        ir.fit(config(model, tmp_path / "run", str(file)))
    held_out = {"texts": {"path": str(file), "column": None, "completion": "text"}, "every": 1}
    cut = {"path": str(file), "too_long": "cut"}
    with pytest.raises(UserError, match=r"^evaluate\.texts: .*a\.jsonl, line 3 has .*; shorten it, or set too_long"):
        ir.fit(config(model, tmp_path / "run", cut, evaluate=held_out))
    values = {"model": str(model), "data": {"prompts": ["a"]}, "supervised": {"data": held_out["texts"]}}
    with pytest.raises(UserError, match=r"^supervised\.data: .*a\.jsonl, line 3 has"):
        ir.train(Config.build({**values, "out": str(tmp_path / "run")}), rewards=[length_of])
    file.write_text('{"text": "fine"}\n{"text": [1]}\n')
    with pytest.raises(UserError, match=r"data\.completion: .*a\.jsonl, line 2 has no text in its column 'text'"):
        ir.fit(config(model, tmp_path / "run", str(file)))
    labels = {"config": ENCODER, "tokenizer": {"kind": "word", "minimum": 1}, "labels": ["0", "1"]}
    file.write_text('{"text": "fine", "label": 1}\n{"text": "bad", "label": 2}\n')
    data = {"path": str(file), "column": "text", "completion": "label"}
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: prompt 1 has the label '2', which the model does not know"):
        ir.fit(Config.build({"model": {"scratch": labels}, "data": data, "algorithm": "likelihood"}))


ENCODER = {
    "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8
}  # fmt: skip


def test_the_command_goes_from_a_file_to_a_report(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "config.yaml").write_text(
        f"model: {{name: {model}, dtype: float32}}\ndata: {tmp_path}/texts.txt\n"
        f"train: {{epochs: 3, tokens_per_step: 24, learning_rate: 0.005}}\n"
        f"evaluate: {{texts: {tmp_path}/texts.txt}}\nout: {tmp_path}/run\n"
    )
    assert cli.main(["fit", str(tmp_path / "config.yaml")]) == 0
    said = capsys.readouterr().out
    assert "Held-out texts, before and after" in said
    assert "nll" in said
    assert (tmp_path / "run" / "report.html").is_file()
    assert cli.main(["fit", "--resume", str(tmp_path / "run")]) == 0
    assert "raise train.epochs to go on" in capsys.readouterr().out
    (tmp_path / "run" / "report.html").unlink()  # as if it had been killed between its last step and its report
    assert cli.main(["fit", "--resume", str(tmp_path / "run")]) == 0
    again = capsys.readouterr().out
    assert again.partition("report:")[0].split() == said[said.index("Held-out") :].partition("report:")[0].split()
    assert (tmp_path / "run" / "report.html").is_file()
    assert cli.main(["fit", str(tmp_path / "config.yaml"), "algorithm=rloo", "--out", str(tmp_path / "other")]) == 2


def test_long_texts_are_cut_or_split_where_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    """Split, each token is a target once; the end token is where the text ends and nowhere else."""
    data = {"prompts": [{"text": "the movie was good and long " * 9}, {"text": "fine"}]}

    def rollouts(too_long: str) -> list[ir.Rollout]:
        made = config(model, tmp_path / too_long, {**data, "too_long": too_long}).model_copy(
            update={"model": config(model, tmp_path).model.model_copy(update={"max_context": 20})}
        )
        job = prepare(made)
        assert isinstance(job.texts, Texts)
        return list(job.texts.rollouts)

    split, cut = rollouts("split"), rollouts("cut")
    end = split[-1].token_ids[-1]
    whole = [*split[0].prompt.info["text"]]
    assert "".join(one.text for one in split[:-1]) == "".join(whole)
    assert all(one.text for one in split), "an end alone would be an empty text"
    assert [one.token_ids[-1] == end for one in split] == [False] * (len(split) - 2) + [True, True]
    assert max(len(one.token_ids) for one in split) == 20
    assert len(cut[0].token_ids) == 20
    assert [one.stop for one in cut] == ["length", "ended"]
    with pytest.raises(UserError, match="the model reads 20"):
        rollouts("refuse")
    with pytest.raises(UserError, match=r"data\.too_long: awr judges whole texts"):
        prepare(config(model, tmp_path / "awr", {**data, "too_long": "cut"}, algorithm={"name": "awr"}), [length_of])


def test_a_comparison_of_output_and_target_rates_given_texts_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that learned by one can be sampled; scoring without a policy says what is missing."""
    (tmp_path / "rules.py").write_text("def agree(output, target):\n    return 1.0 + (output == target)\n")
    rule = f"{tmp_path / 'rules.py'}:agree"
    run = ir.fit(config(model, tmp_path / "run", rewards=[rule]))
    assert run.metrics[-1]["reward/agree"] >= 1.0
    assert cli.main(["sample", str(run.path), "the movie", "--max-new-tokens", "3"]) == 0
    (tmp_path / "texts.txt").write_text("fine\n")
    assert cli.main(["score", "--reward", rule, str(tmp_path / "texts.txt")]) == 2
    assert "which there is in fit alone" in capsys.readouterr().err
