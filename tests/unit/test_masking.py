"""Random masks in given texts: what a masked model learns from them, from a file of texts to a model that fills."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import instant_reward as ir
from choosing import blank_tokenizer, tiny_masked
from instant_reward.batch import collate
from instant_reward.cli import main
from instant_reward.config import Config, DataConfig, as_supervised
from instant_reward.data import Row
from instant_reward.fitting import HeldOutTexts, Texts
from instant_reward.masking import MaskedTexts
from instant_reward.policies.decisions import Steps
from instant_reward.policies.drafts import STOP
from instant_reward.policies.masked import MaskedPolicy
from instant_reward.start import load_run_policy
from instant_reward.stored import Stored, held
from instant_reward.train import prepare
from instant_reward.types import UserError
from tiny import tiny_folder
from what_counts import plain, weights

TEXTS = ["a b c a b c a b", "b c a", "c", "a b a b a b"]
SENTENCES = ["the movie was good and long", "the movie was bad, but not slow!", "a fine movie of the sea"] * 4
BERT = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 32,
}  # fmt: skip


def data(texts: list[str] = TEXTS, **options: Any) -> DataConfig:
    return DataConfig(prompts=texts, completion="text", column=None, **{"masks": {"share": 0.4}, **options})


def masked_texts(policy: Any = None, room: int = 16, **options: Any) -> MaskedTexts:
    rows = [{"text": text} for text in options.pop("texts", TEXTS)]
    return MaskedTexts(rows, data(**options), tiny_masked() if policy is None else policy, room)


def run_config(out: Path, texts: Any = None, **sections: Any) -> Config:
    scratch = {"kind": "masked", "config": BERT, "tokenizer": {"kind": "word", "minimum": 1}}
    values = {
        "model": {"scratch": scratch, "dtype": "float32"},
        "data": {"prompts": SENTENCES, "masks": {"share": 0.3}} if texts is None else texts,
        "train": {"steps": 8, "prompts_per_step": 4, "learning_rate": 3e-3, **sections.pop("train", {})},
        "out": str(out),
        **sections,
    }
    return Config.build(as_supervised(values))


def of_tokens(policy: MaskedPolicy, masked: list[int]) -> torch.Tensor:
    """``[L, V]``, by the model alone: the log-probabilities of what may be written at each place."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([masked])).logits[0]
    logits[:, list(policy.slots.forbidden)] = -torch.inf
    return logits.log_softmax(-1)


def test_a_share_of_the_known_tokens_is_masked_anew_each_time() -> None:
    texts = masked_texts(texts=["a b zzz c a b c a b", "c"])
    seen = set()
    for turn in range(60):
        group = texts.group(0, turn)
        assert len(group) == 4  # 0.4 of 8, rounded up; the unknown word is none of them
        context = group[0].context
        assert context is not None
        assert all(one.context == context for one in group)
        places = [i for i, one in enumerate(context) if one == 3]
        true = list(blank_tokenizer()("a b zzz c a b c a b")["input_ids"])
        assert [one.token_ids for one in group] == [[1 + k * 10 + true[i]] for k, i in enumerate(places)]
        assert [token for i, token in enumerate(context) if i not in places] == [
            token for i, token in enumerate(true) if i not in places
        ]
        assert all(one.logprobs == [-math.log(4)] for one in group)
        seen.add(tuple(places))
    assert len(seen) > 30
    assert not any(3 in places for places in seen)
    assert [one.context for one in texts.group(0, 7)] == [
        one.context for one in masked_texts(texts=["a b zzz c a b c a b"]).group(0, 7)
    ]
    other = masked_texts(texts=["a b zzz c a b c a b"], masks={"share": 0.4, "seed": 1})
    assert [other.group(0, turn)[0].context for turn in range(5)] != [
        texts.group(0, turn)[0].context for turn in range(5)
    ]
    ranging = masked_texts(masks={"share": [0.01, 1.0]})
    counts = {len(ranging.group(0, turn)) for turn in range(80)}
    assert counts == set(range(1, 9))


def test_held_out_figures_are_those_of_a_direct_computation() -> None:
    """Per masked token, its place given: neither the choice of the place counts nor tokens that are never written."""
    policy = tiny_masked()
    torch.nn.init.zeros_(policy.model.order.weight)
    held_out = HeldOutTexts(data(), policy)
    found = held_out.measure(policy)
    assert set(found) == {"nll", "perplexity", "accuracy"}
    each, right = [], []
    for number in range(len(TEXTS)):
        group = held_out.texts.group(number)  # type: ignore[union-attr]
        table = of_tokens(policy, group[0].context)
        true = blank_tokenizer()(TEXTS[number])["input_ids"]
        for i in (i for i, one in enumerate(group[0].context) if one == 3):
            each.append(-float(table[i, true[i]]))
            right.append(int(table[i].argmax()) == true[i])
    assert found["nll"] == pytest.approx(sum(each) / len(each), abs=1e-6)
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)
    assert held_out.measure(policy) == found


def test_with_even_shares_the_mean_is_that_of_filling_in_a_random_order() -> None:
    """The mean over numbers of masks, over their places, and over targets, by enumeration of all orders."""
    policy, true = tiny_masked(), list(blank_tokenizer()("a c b b")["input_ids"])
    places = range(1, 5)

    def gain(masked: set[int], i: int) -> float:
        return float(of_tokens(policy, [3 if k in masked else one for k, one in enumerate(true)])[i, true[i]])

    by_masks = [
        [sum(gain(set(some), i) for i in some) / size for some in itertools.combinations(places, size)]
        for size in places
    ]
    drawn = sum(sum(each) / len(each) for each in by_masks) / len(by_masks)
    orders = list(itertools.permutations(places))
    in_order = sum(gain(set(order[t:]), order[t]) for order in orders for t in range(4)) / (4 * len(orders))
    assert drawn == pytest.approx(in_order, abs=1e-10)
    texts = masked_texts(texts=["a c b b"], masks={"share": [1e-6, 1.0]})
    sizes = [len(texts.group(0, turn)) for turn in range(1000)]
    assert all(200 < sizes.count(size) < 300 for size in places)


def test_targets_of_a_text_are_read_once_and_the_order_stays_random() -> None:
    policy = tiny_masked()
    torch.nn.init.zeros_(policy.model.order.weight)
    groups = [masked_texts(policy).group(number) for number in range(len(TEXTS))]
    rollouts = [one for number, group in enumerate(groups) for one in group]
    for rollout, number in zip(rollouts, [n for n, group in enumerate(groups) for _ in group], strict=True):
        rollout.group = number
    rows = []
    policy.model.base_model.register_forward_hook(lambda _, __, made: rows.append(len(made[0])))
    batch = collate(rollouts, pad_id=policy.pad_id, dtype=torch.float64)
    logprobs = policy(batch).logprobs
    assert rows == [len(TEXTS)]
    alone = torch.cat([policy(batch.select([row])).logprobs for row in range(len(batch))])
    assert torch.allclose(logprobs, alone, atol=1e-12, rtol=0)
    (-logprobs[batch.mask].mean()).backward()  # type: ignore[no-untyped-call]
    assert float(policy.model.order.weight.grad.abs().max()) < 1e-12
    assert float(policy.model.get_output_embeddings().weight.grad.abs().max()) > 1e-3


def test_the_likeliest_of_a_fill_is_a_token_at_its_place() -> None:
    editor = tiny_masked(edits=True)
    (prompt,) = editor.prompts([{"prompt": "[MASK] b [MASK]"}], "prompt", 4)
    table = of_tokens(editor, list(prompt.context or []))
    wanted = [1 + place * 10 + int(table[1 + place].argmax()) for place in (0, 2)]
    steps = Steps(torch.zeros(3, dtype=torch.long), [[], [], []])
    head = editor.choose(editor.model, [prompt.context], steps, torch.zeros(3, dtype=torch.bool))
    found = head.likeliest(torch.tensor([1 + 5, STOP, 1 + 20 + 6])).tolist()
    assert [found[0], found[2]] == wanted
    whole = head.logprobs(slice(0, 1))[0]
    assert found[1] == int(whole.argmax())


def test_the_command_goes_from_a_file_of_texts_to_a_model_that_fills(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    texts = {"path": str(tmp_path / "texts.txt"), "masks": {"share": 0.3}}
    values = run_config(tmp_path / "run", texts).model_dump(mode="json")
    values["evaluate"] = {"every": 20, "texts": {**values["data"], "masks": {"share": 0.15}}}
    values["train"] |= {"steps": 120, "prompts_per_step": 8}
    (tmp_path / "fill.yaml").write_text(yaml.safe_dump(values))
    assert main(["fit", str(tmp_path / "fill.yaml")]) == 0
    policy, _ = load_run_policy(tmp_path / "run")
    assert isinstance(policy, MaskedPolicy)
    rows = ir.train.Run.open(tmp_path / "run").metrics  # type: ignore[attr-defined]
    figures = [row["held_out/perplexity"] for row in rows if "held_out/perplexity" in row]
    assert figures[-1] < 1.5 < figures[0]
    (text,) = policy.sample(["the movie was bad, <mask> not slow!"], temperature=0.01)
    assert text.text == "the movie was bad, but not slow!"
    assert main(["sample", str(tmp_path / "run"), "the <mask> was good", "--max-new-tokens", "1"]) == 0
    assert "movie" in capsys.readouterr().out


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    whole, half = (run_config(tmp_path / name, train={"save_every": 2}) for name in ("whole", "half"))
    unbroken = ir.fit(whole)
    ir.fit(half.model_copy(update={"train": half.train.model_copy(update={"steps": 4})}))
    resumed = ir.fit(half, resume=True)
    assert plain(resumed.metrics) == plain(unbroken.metrics)
    assert weights(resumed) == weights(unbroken)


def missed(output: str, target: str) -> float:
    return 3.0 if output != target else 1.0


def test_rewards_weigh_the_targets(tmp_path: Path) -> None:
    @ir.reward(every="end")
    def long_words(view: ir.View) -> float:
        return 2.0 if view.info["text"].startswith("the") else 0.0

    job = prepare(run_config(tmp_path / "run", train={"prompts_per_step": 12}), [long_words])
    assert isinstance(job.texts, Texts)
    groups = job.texts.groups(None, 1)
    assert len(groups) == 12
    assert {len(group) for group in groups} == {2, 3}
    for group in groups:
        the = group[0].info["text"].startswith("the")
        assert [one.total() for one in group] == [2.0 * the] * len(group)
    run = ir.fit(run_config(tmp_path / "compared"), rewards=[missed])
    assert 1.0 < run.metrics[0]["target_weight"] <= 3.0


def test_long_texts_are_cut_or_split() -> None:
    text = "a b c a b c a b"
    assert masked_texts(texts=[text], room=6, too_long="cut").lengths.tolist() == [6]
    split = masked_texts(texts=[text, "c"], room=6, too_long="split")
    assert split.lengths.tolist() == [6, 6, 3]
    assert [split.texts[number][1][1:-1] for number in range(3)] == [[5, 6, 7, 5], [6, 7, 5, 6], [7]]
    with pytest.raises(UserError, match=r"prompt 0 has a text of 10 tokens, and the model reads 6: .*too_long"):
        masked_texts(texts=[text], room=6)


def test_texts_that_lie_on_disk_are_the_same() -> None:
    rows = held(({"text": text} for text in TEXTS), True)
    streamed = MaskedTexts(rows, data(), tiny_masked(), 16)
    assert isinstance(streamed.texts, Stored)
    assert streamed.lengths == masked_texts().lengths
    assert [streamed.group(number, 3) for number in range(4)] == [
        masked_texts().group(number, 3) for number in range(4)
    ]


def test_masked_texts_are_learned_beside_a_reward(tmp_path: Path) -> None:
    texts = {"prompts": [{"text": text} for text in SENTENCES], "column": None, "completion": "text", "masks": {}}
    prompts = {"prompts": ["the movie was <mask> and <mask>", "a <mask>"], "column": "prompt", "completion": None}
    options: dict[str, Any] = {"algorithm": {"name": "rloo"}, "supervised": {"data": texts, "warmup_steps": 2}}
    config = run_config(tmp_path / "run", prompts, train={"prompts_per_step": 2, "group_size": 4}, **options)
    run = ir.train(config, rewards=[lambda text: float(text.count("o"))])
    assert all("nll" in row for row in run.metrics[:2])
    assert all(0.0 < row["supervised/nll"] < 10.0 for row in run.metrics[2:])
    with pytest.raises(UserError, match=r"data\.masks: awr learns nothing of them"):
        ir.train(run_config(tmp_path / "other", algorithm={"name": "awr"}), rewards=[lambda text: 1.0])


def test_what_cannot_be_learned_from_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompt 1 has a text without a token that is ever written"):
        masked_texts(texts=["a b", "zzz"])
    with pytest.raises(UserError, match=r"data\.completion: prompt 1 has no text"):
        masked_texts(texts=["a b", ""])
    rows = [Row({"text": "zzz"}, "a.csv, line 7")]
    with pytest.raises(UserError, match=r"a\.csv, line 7 has a text without a token"):
        MaskedTexts(rows, data(), tiny_masked(), 16)
    with pytest.raises(UserError, match=r"data\.masks: .*one that edits learns from pairs"):
        masked_texts(tiny_masked(edits=True))
    with pytest.raises(UserError, match=r"data\.masks: .*this is none"):
        masked_texts(ir.load_policy(str(tiny_folder(tmp_path / "causal"))))
    with pytest.raises(UserError, match=r"data\.column: a masked model fills .*data\.masks"):
        ir.fit(run_config(tmp_path / "run", {"prompts": SENTENCES}))
    for wrong, message in (
        ({"masks": {"share": [0.5, 0.1]}}, "goes from 0.5 down to 0.1"),
        ({"masks": {"share": 0}}, "share"),
        ({"masks": {}, "column": "prompt"}, "set column to null"),
    ):
        with pytest.raises(UserError, match=message):
            run_config(tmp_path / "run", {"prompts": SENTENCES, **wrong})
