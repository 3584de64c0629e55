"""Fluency, log-ratios and reward models: their values against the plain models', what they cost, what they refuse."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from instant_reward.assemble import build_rewards
from instant_reward.config import RewardConfig
from instant_reward.rewards import language_model
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.fluency import Fluency, LogRatio
from instant_reward.rewards.reward_model import RewardModel, StepRewardModel, TokenRewardModel
from instant_reward.rewards.watch import Watch
from instant_reward.text import TextDecoder
from instant_reward.types import Prompt, UserError, View
from tiny import CONTEXT, END, exact, shared_tokenizer, tiny_config, tiny_folder, tiny_llama, tiny_tokenizer

TOKENIZER = shared_tokenizer()
LONG = 1024
TEXT = " good movie. It was not slow\n你好, fine!"
WEIRD = {
    "empty": "",
    "one token": "cat",
    "spaces": " \n\t\u3000 ",
    "10,000 characters": "the cat sat on a mat, 42 times. " * 313,
    "only emoji": "👍🏽👨‍👩‍👧🇫🇷❤️" * 5,
    "right to left": "مرحبا، كيف الحال؟ ٤٢ שלום ",
    "control characters": "\x00\x07\x1b[31m\x7f\x85\u200e\u202e\ufeff42",
    "a lone surrogate": "cat \ud83d 42 \udfff\ud800",
    "the end token's name": f"good{END} movie",
    "Chinese": "今天天气很好。一共42个。" * 3,
}


def near(value: Any) -> Any:
    return pytest.approx(value, abs=1e-6)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def made(cls: Any, config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return exact(cls(config).double()).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One tiny model of every kind."""
    root = tmp_path_factory.mktemp("models")
    plain = tiny_config(max_position_embeddings=LONG)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LONG, "initializer_range": 0.3}
    gpt2 = GPT2Config(vocab_size=len(TOKENIZER), num_labels=1, **sizes)
    bert = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    bert |= {"vocab_size": len(TOKENIZER), "pad_token_id": TOKENIZER.pad_token_id, "initializer_range": 0.3}
    bert |= {"max_position_embeddings": CONTEXT}
    mamba = MambaConfig(vocab_size=len(TOKENIZER), hidden_size=16, num_hidden_layers=2, state_size=4)
    models = {
        "one": tiny_llama(0, max_position_embeddings=LONG),
        "two": tiny_llama(1, max_position_embeddings=LONG),
        "sliding": made(MistralForCausalLM, MistralConfig(**plain, sliding_window=4)),
        "recurrent": MambaForCausalLM(mamba),
        "whole": made(LlamaForSequenceClassification, LlamaConfig(**plain, num_labels=1)),
        "classes": made(LlamaForSequenceClassification, LlamaConfig(**plain, num_labels=3)),
        "tokens": made(LlamaForTokenClassification, LlamaConfig(**plain, num_labels=2)),
        "scalar": made(GPT2ForTokenClassification, gpt2),
        "both ways": made(BertForSequenceClassification, BertConfig(**bert, num_labels=1)),
        "tokens both ways": made(BertForTokenClassification, BertConfig(**bert, num_labels=2)),
    }
    models["tokens"].config.id2label = {0: "bad", 1: "good"}
    models["tokens"].config.label2id = {"bad": 0, "good": 1}
    return {name: str(tiny_folder(root / name.replace(" ", "-"), model)) for name, model in models.items()}


@pytest.fixture(scope="module")
def fluency(folders: dict[str, str]) -> Fluency:
    reward = Fluency(folders["one"], dtype="float64")
    exact(frozen_of(reward).model)
    return reward


def frozen_of(reward: Any) -> language_model.Frozen:
    frozen: language_model.Frozen = reward.scorers[0][0].frozen if hasattr(reward, "scorers") else reward.frozen
    return frozen


def states_of(reward: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = frozen_of(reward).trunk(torch.tensor([ids])).last_hidden_state[0]
    return states


def logprobs(reward: Any, before: list[int], text: str) -> list[float]:
    ids = before + ids_of(text)
    with torch.no_grad():
        found = frozen_of(reward).model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(found[i - 1, ids[i]]) for i in range(len(before), len(ids))]


def by_piece(reward: Any, pieces: list[str], prompt: Prompt) -> list[Any]:
    state, text, paid = reward.start(prompt), "", []
    for number, piece in enumerate(pieces):
        text += piece
        view = View(text, piece, prompt, prompt.info, done=number + 1 == len(pieces))
        paid += reward.extend([state], [view])
    return paid


class TestFrozen:
    def test_a_text_that_turns_out_to_begin_otherwise_than_its_prompt_is_read_anew_from_there(
        self, fluency: Fluency
    ) -> None:
        frozen = frozen_of(fluency)
        base = ids_of("the movie was slow")
        memory = frozen.memory(base)
        for ids, new in (
            ([*base, 7, 8], len(base) + 2),  # the prompt is read for it
            ([*base[:2], 9, 10], 2),
            ([*base[:2], 9, 11, 12], 2),
            (base, len(base) - 2),
        ):
            before = frozen.tokens_read
            (found,) = frozen.read(
                [language_model.Job(memory, ids, len(ids) - 1, len(ids))], lambda states, _: states, logits=False
            )
            assert frozen.tokens_read - before == new
            assert torch.allclose(found[0], states_of(fluency, ids)[-1], atol=1e-9)


class TestFluency:
    def test_each_token_is_paid_on_its_characters(self, fluency: Fluency) -> None:
        (spans,) = by_piece(fluency, [" good movie 你"], Prompt("p", "So:", []))
        # The three bytes of the character that is no token of its own are paid together.
        assert [(span.start, span.end) for span in spans] == [(0, 5), (5, 11), (11, 12), (12, 13)]
        values = logprobs(fluency, ids_of("So:"), " good movie 你")
        assert [span.value for span in spans] == near([*values[:3], sum(values[3:])])

    def test_a_policy_that_cuts_otherwise_is_paid_on_the_tokens_that_carry_the_characters(
        self, fluency: Fluency
    ) -> None:
        watch = Watch([as_reward(fluency).but(every="end")], TextDecoder(TOKENIZER))
        watch.open(0, Prompt("p", "So:", [1]))
        letters = [ids_of(character)[0] for character in " good"]
        marks, _ = watch.feed(0, [*letters, *ids_of(" movie")], done=True)
        assert [(mark.start, mark.end) for mark in marks] == [(1, 6), (6, 7)]
        assert [mark.value for mark in marks] == near(logprobs(fluency, ids_of("So:"), " good movie"))

    def test_what_was_paid_for_a_token_that_is_no_more_is_taken_back(self, fluency: Fluency) -> None:
        first, second = by_piece(fluency, [" mov", "ie"], Prompt("p", "So:", []))
        pieces = logprobs(fluency, ids_of("So:"), " mov")
        (whole,) = logprobs(fluency, ids_of("So:"), " movie")
        assert sum(span.value for span in first) == near(sum(pieces))
        assert [(span.start, span.end) for span in second] == [(0, 6)]
        assert second[0].value == near(whole - sum(pieces))

    def test_the_mean_of_a_piece_is_that_of_its_tokens(self, folders: dict[str, str], fluency: Fluency) -> None:
        reward = Fluency(folders["one"], mean=True, dtype="float64")
        values = logprobs(fluency, ids_of("So:"), " good movie was slow")
        paid = by_piece(reward, [" good movie", "", " was slow"], Prompt("p", "So:", []))
        assert paid == [near(sum(values[:2]) / 2), None, near(sum(values[2:]) / 2)]
        assert reward.score(" good movie was slow", "So:") == near(sum(values) / 4)
        assert reward.score("") == 0.0

    def test_no_token_counts_less_than_the_clip(self, folders: dict[str, str], fluency: Fluency) -> None:
        values = logprobs(fluency, ids_of("So:"), TEXT)
        assert min(values) < -4 < max(values)
        clipped = Fluency(folders["one"], clip=4, dtype="float64")
        assert clipped.score(TEXT, "So:") == near(sum(max(-4.0, value) for value in values))

    def test_without_the_prompt_a_text_begins_after_the_begin_or_end_token(
        self, folders: dict[str, str], fluency: Fluency
    ) -> None:
        reward = Fluency(folders["one"], see_prompt=False, dtype="float64")
        alone = sum(logprobs(fluency, [TOKENIZER.eos_token_id], TEXT))
        assert reward.score(TEXT, "So:") == near(alone) == reward.score(TEXT)
        assert fluency.score(TEXT) == near(alone) != near(fluency.score(TEXT, "So:"))

    def test_messages_go_through_the_models_own_template(self, fluency: Fluency) -> None:
        messages = [{"role": "user", "content": "So?"}]
        prompt = Prompt("p", "<|the policy's|>So?", [1, 2, 3], messages=messages)
        (spans,) = by_piece(fluency, [" good"], prompt)
        assert sum(span.value for span in spans) == near(
            sum(logprobs(fluency, ids_of("user: So?\nassistant:"), " good"))
        )

    def test_texts_of_one_prompt_share_what_was_read_of_it(self, fluency: Fluency) -> None:
        prompt = Prompt("p", "the movie was slow and long but not bad", [])
        length = len(ids_of(prompt.text))
        states = [fluency.start(prompt) for _ in range(8)]
        before = frozen_of(fluency).tokens_read
        for state in states:  # their first pieces end at different times
            fluency.extend([state], [View(" good", " good", prompt, {}, done=False)])
        assert frozen_of(fluency).tokens_read - before == (length - 1) + 8

    def test_nothing_is_kept_when_the_texts_are_gone(self, folders: dict[str, str]) -> None:
        reward = Fluency(folders["two"], dtype="float32")
        states = [reward.start(Prompt("p", "the movie", [])) for _ in range(2)]
        assert len(frozen_of(reward)._bases) == 1
        del states
        assert len(frozen_of(reward)._bases) == 0
        assert len(language_model._LOADED) >= 1
        key = next(key for key, one in language_model._LOADED.items() if one is frozen_of(reward))
        del reward
        gc.collect()
        assert key not in language_model._LOADED

    def test_rewards_share_a_model(self, folders: dict[str, str], fluency: Fluency) -> None:
        assert frozen_of(Fluency(folders["one"], mean=True, dtype="float64")) is frozen_of(fluency)
        assert frozen_of(Fluency(folders["one"], dtype="float32")) is not frozen_of(fluency)

    def test_many_texts_are_read_in_batches_that_fit(self, fluency: Fluency, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = [TEXT * (1 + number % 3) for number in range(9)]
        prompt = Prompt("p", "the movie was", [])
        views = [View(text, text, prompt, {}, done=True) for text in texts]
        whole = fluency.extend([fluency.start(prompt) for _ in texts], views)
        monkeypatch.setattr(language_model, "_NUMBERS", 20 * len(TOKENIZER))
        monkeypatch.setattr(language_model, "_REMEMBERED", 2**14)
        monkeypatch.setattr(language_model, "_AT_ONCE", 2)
        sizes: list[int] = []
        hook = frozen_of(fluency).model.register_forward_hook(
            lambda _, __, out: sizes.append(out.logits[..., 0].numel())
        )
        parts = fluency.extend([fluency.start(prompt) for _ in texts], views)
        hook.remove()
        assert max(sizes) <= 20
        for one, other in zip(whole, parts, strict=True):
            assert [span.value for span in one] == near([span.value for span in other])

    @pytest.mark.parametrize("kind", ["sliding", "recurrent"])
    def test_a_model_that_cannot_go_on_reads_again_and_says_the_same(self, folders: dict[str, str], kind: str) -> None:
        reward = Fluency(folders[kind], dtype="float64")
        frozen = frozen_of(reward)
        exact(frozen.model)
        assert frozen.causal
        assert not frozen.reuses
        pieces = [" good", " movie. It", " was not slow"]
        before = frozen.tokens_read
        paid = by_piece(reward, pieces, Prompt("p", "So:", []))
        assert sum(span.value for spans in paid for span in spans) == near(
            sum(logprobs(reward, ids_of("So:"), "".join(pieces)))
        )
        read = [len(ids_of("So:" + "".join(pieces[: number + 1]))) - 1 for number in range(3)]
        assert frozen.tokens_read - before == sum(read)

    def test_the_weights_stay_as_they_are_and_no_gradient_is_kept(self, fluency: Fluency) -> None:
        before = [weight.clone() for weight in frozen_of(fluency).model.parameters()]
        fluency.score(TEXT)
        assert all(map(torch.equal, before, frozen_of(fluency).model.parameters()))
        assert not any(weight.requires_grad for weight in frozen_of(fluency).model.parameters())

    def test_bfloat16_says_about_the_same(self, folders: dict[str, str], fluency: Fluency) -> None:
        rough = Fluency(folders["one"], dtype="bfloat16")
        assert rough.score(TEXT, "So:") == pytest.approx(fluency.score(TEXT, "So:"), rel=0.05)

    def test_a_config_names_it(self, folders: dict[str, str]) -> None:
        args = {"model": folders["one"], "dtype": "float64", "clip": 9}
        use = "instant_reward.rewards.fluency:Fluency"
        words, sentences = build_rewards(
            [RewardConfig(use=use, args=args), RewardConfig(use=use, args=args, every="sentence", name="sentences")]
        )
        assert [(one.every, one.batched, one.scope) for one in (words, sentences)] == [
            ("word", True, "text"),
            ("sentence", True, "text"),
        ]
        watch = Watch([words, sentences], TextDecoder(TOKENIZER))
        for row in range(3):
            watch.open(row, Prompt("p", "So:", ids_of("So:")))
        marks = [row[0] for row in watch.feed_many([(row, ids_of(TEXT * (row + 1)), True) for row in range(3)])]
        for row in range(3):
            both = [sum(m.value for m in marks[row] if m.source == one.name) for one in (words, sentences)]
            assert both[0] == near(both[1])

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ({"clip": 0}, "clip=0 must be a number above 0"),
            ({"mean": "yes"}, "mean='yes' must be true or false"),
            ({"see_prompt": 1}, "see_prompt=1 must be true or false"),
            ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ],
    )
    def test_arguments_that_are_none(self, folders: dict[str, str], args: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said):
            Fluency(folders["one"], **args)

    def test_models_that_are_none(self, folders: dict[str, str], tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no trained weights"):
            Fluency(folders["tokens"])
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError, match="cannot be loaded"):
            Fluency(str(tmp_path))


class TestLogRatio:
    def test_each_token_has_the_difference_of_both_models(self, folders: dict[str, str]) -> None:
        ratio = LogRatio(folders["one"], folders["two"], dtype="float64")
        pair = [scorer.frozen for scorer, _ in ratio.scorers]
        values = []
        for frozen in pair:
            exact(frozen.model)
            ids = ids_of("So:") + ids_of(" good movie was")
            found = frozen.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            values.append([float(found[i - 1, ids[i]]) for i in range(len(ids_of("So:")), len(ids))])
        expected = [a - b for a, b in zip(*values, strict=True)]
        (spans,) = by_piece(ratio, [" good movie was"], Prompt("p", "So:", []))
        assert [span.value for span in spans] == near(expected)
        mean = LogRatio(folders["one"], folders["two"], mean=True, dtype="float64")
        assert mean.score(" good movie was", "So:") == near(sum(expected) / 3)

    def test_a_model_against_itself_is_nothing(self, folders: dict[str, str]) -> None:
        assert LogRatio(folders["one"], folders["one"], dtype="float64").score(TEXT) == near(0.0)


class TestRewardModel:
    def test_it_is_what_the_model_itself_says(self, folders: dict[str, str]) -> None:
        reward = RewardModel(folders["whole"], dtype="float64")
        exact(reward.frozen.model)
        prompts = ["So:", "", "the movie was"]
        made_of = [TOKENIZER(prompt + TEXT, return_tensors="pt") for prompt in prompts]
        expected = [float(reward.frozen.model(**inputs).logits[0, 0].detach()) for inputs in made_of]
        about = [Prompt("p", prompt, []) for prompt in prompts]
        views = [View(TEXT, TEXT, prompt, {}, done=True) for prompt in about]
        assert reward.extend([reward.start(prompt) for prompt in about], views) == near(expected)
        assert reward.score(TEXT, "So:") == near(expected[0])

    def test_messages_and_the_reply_go_through_the_template(self, folders: dict[str, str]) -> None:
        reward = RewardModel(folders["whole"], dtype="float64")
        messages = [{"role": "user", "content": "So?"}]
        rendered = TOKENIZER(f"user: So?\nassistant: {TEXT}\n", return_tensors="pt")
        assert reward.score(TEXT, messages) == near(float(reward.frozen.model(**rendered).logits[0, 0].detach()))

    @pytest.mark.parametrize(
        "prompt", [Prompt("p", "So:", []), Prompt("p", "", [], [{"role": "user", "content": "?"}])]
    )
    def test_scoring_every_sentence_costs_one_pass(self, folders: dict[str, str], prompt: Prompt) -> None:
        reward = RewardModel(folders["whole"], change=True, dtype="float64")
        exact(reward.frozen.model)
        pieces = [" good movie.", " It was slow.", " And long but fine."]
        before = reward.frozen.tokens_read
        paid = by_piece(reward, pieces, prompt)
        count = reward.frozen.tokens_read - before
        said = prompt.messages or prompt.text
        assert sum(paid) == near(reward.score("".join(pieces), said) - reward.score("", said))
        assert paid[0] == near(reward.score(pieces[0], said) - reward.score("", said))
        whole = len(ids_of("".join(pieces))) + len(ids_of("user: ?\nassistant: " if prompt.messages else "So:"))
        assert count <= whole + 2 * (len(pieces) + 1)  # the end of the turn, and a token that joins what follows

    def test_a_model_without_direction_reads_pairs_anew(self, folders: dict[str, str]) -> None:
        reward = RewardModel(folders["both ways"], dtype="float64")
        assert not reward.frozen.causal
        prompts, texts = ["So:", "", "the movie was"], [" good", TEXT, TEXT * 2]
        about = [Prompt("p", prompt, []) for prompt in prompts]
        views = [View(text, text, prompt, {}, done=True) for prompt, text in zip(about, texts, strict=True)]
        expected = []
        for prompt, text in zip(prompts, texts, strict=True):
            inputs = TOKENIZER(*([prompt, text] if prompt else [text]), return_tensors="pt")
            expected.append(float(reward.frozen.model(**inputs).logits[0, 0].detach()))
        assert reward.extend([reward.start(prompt) for prompt in about], views) == near(expected)

    def test_it_is_a_final_score_or_a_change_by_sentences(self, folders: dict[str, str]) -> None:
        assert as_reward(RewardModel(folders["whole"])).every == "end"
        assert as_reward(RewardModel(folders["whole"], change=True)).every == "sentence"

    @pytest.mark.parametrize(
        ("kind", "said"), [("classes", "has 3 outputs and not one"), ("one", "no trained weights score")]
    )
    def test_models_that_are_none(self, folders: dict[str, str], kind: str, said: str) -> None:
        with pytest.raises(UserError, match=said):
            RewardModel(folders[kind])


class TestStepRewardModel:
    def test_a_classifier_is_read_at_the_end_of_each_step(self, folders: dict[str, str]) -> None:
        reward = StepRewardModel(folders["tokens"], label="good", dtype="float64")
        pieces = ["the movie.", " It was good.", " Not bad"]
        ids, expected = ids_of("So:"), []
        for piece in pieces:
            ids = ids + ids_of(piece)
            expected.append(float(reward.frozen.model(torch.tensor([ids])).logits[0, -1].softmax(-1)[1]))
        before = reward.frozen.tokens_read
        assert by_piece(reward, pieces, Prompt("p", "So:", [])) == near(expected)
        assert reward.frozen.tokens_read - before == len(ids)
        other = StepRewardModel(folders["tokens"], label=0, dtype="float64")
        assert by_piece(other, pieces, Prompt("p", "So:", [])) == near([1 - value for value in expected])

    @pytest.mark.parametrize("kind", ["scalar", "whole"])
    def test_one_output_is_the_value_itself(self, folders: dict[str, str], kind: str) -> None:
        reward = StepRewardModel(folders[kind], dtype="float64")
        exact(reward.frozen.model)
        ids = ids_of("So:") + ids_of("the movie.")
        head = reward.frozen.model.score if kind == "whole" else reward.frozen.model.classifier
        assert reward.score("the movie.", "So:") == near(float(head(states_of(reward, ids)[-1]).detach()))

    def test_a_language_model_says_good_or_bad_after_a_separator(self, folders: dict[str, str]) -> None:
        args = {"good": " good", "bad": " bad", "separator": " it!", "between": "\n"}
        reward = StepRewardModel(folders["one"], dtype="float64", **args)
        exact(reward.frozen.model)
        pair = [*ids_of(" good"), *ids_of(" bad")]
        ids, expected = ids_of("So:"), []
        for number, step in enumerate(["the movie", "was slow"]):
            ids = ids + (ids_of("\n") if number else []) + ids_of(step) + ids_of(" it!")
            logits = reward.frozen.model(torch.tensor([ids])).logits[0, -1]
            expected.append(float(logits[pair].softmax(-1)[0]))
        paid = by_piece(reward, ["the movie\n", "\n", "  was slow", ""], Prompt("p", "So:", []))
        assert paid == [near(expected[0]), None, near(expected[1]), None]

    @pytest.mark.parametrize(
        ("kind", "args", "said"),
        [
            ("one", {}, "was made as LlamaForCausalLM"),
            ("one", {"good": " good"}, "give both good and bad"),
            ("one", {"good": " good", "bad": "zq"}, "'zq' is 2 tokens"),
            ("tokens", {"between": "\n"}, "stands after a separator"),
            ("tokens", {"label": "best"}, "label='best' is none of"),
            ("tokens", {"label": 2}, "it has bad, good"),
            ("scalar", {"label": 0}, "one output without a label"),
            ("tokens both ways", {}, "reads in both directions"),
        ],
    )
    def test_what_it_refuses(self, folders: dict[str, str], kind: str, args: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said):
            StepRewardModel(folders[kind], **args)


class TestTokenRewardModel:
    def test_it_is_read_at_every_token(self, folders: dict[str, str]) -> None:
        reward = TokenRewardModel(folders["scalar"], dtype="float64")
        ids = ids_of("So:") + ids_of(" good movie was slow")
        expected = frozen_of(reward).model(torch.tensor([ids])).logits[0, len(ids_of("So:")) :, 0].tolist()
        paid = by_piece(reward, [" good movie", " was", " slow"], Prompt("p", "So:", []))
        assert [span.value for spans in paid for span in spans] == near(expected)
        mean = TokenRewardModel(folders["scalar"], mean=True, dtype="float64")
        assert mean.score(" good movie was slow", "So:") == near(sum(expected) / 4)

    def test_more_outputs_are_probabilities(self, folders: dict[str, str]) -> None:
        reward = TokenRewardModel(folders["tokens"], label="bad", dtype="float64")
        ids = ids_of("So:") + ids_of(" good movie")
        expected = frozen_of(reward).model(torch.tensor([ids])).logits[0].softmax(-1)[-2:, 0].tolist()
        (spans,) = by_piece(reward, [" good movie"], Prompt("p", "So:", []))
        assert [span.value for span in spans] == near(expected)


@pytest.mark.parametrize("text", WEIRD.values(), ids=WEIRD)
def test_weird_texts_are_scored(folders: dict[str, str], text: str) -> None:
    rewards = [
        Fluency(folders["one"], mean=True),
        RewardModel(folders["whole"], change=True),
        RewardModel(folders["both ways"]),
        StepRewardModel(folders["tokens"]),
        TokenRewardModel(folders["scalar"], mean=True),
    ]
    for reward in rewards:
        value: Any = reward.score(text, text)  # for a prompt, too
        assert value is None or abs(value) < 1e6
        middle = len(text) // 2
        paid = by_piece(reward, [text[:middle], text[middle:]], Prompt("p", "", []))
        assert all(value is None or abs(value) < 1e6 for value in paid)


def test_a_tokenizer_without_anything_to_begin_with_says_so(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(pad=False)
    tokenizer.eos_token = None
    reward = Fluency(str(tiny_folder(tmp_path / "model", tiny_llama(), tokenizer)))
    assert reward.score(" good", "So:") < 0
    with pytest.raises(UserError, match="no token that an empty prompt could begin with"):
        reward.score(" good")


GOOD = [
    "The cat sat quietly on the old wooden chair.",
    "She opened the window to let in some fresh air.",
    "We went to the market to buy bread and milk.",
    "The train arrives at the station at nine o'clock.",
    "He wrote a long letter to his grandmother.",
    "Children were playing football in the park.",
    "The book on the table belongs to my sister.",
    "It was raining, so they stayed at home.",
]


@pytest.fixture
def shuffled() -> list[str]:
    def turned(text: str) -> str:
        words = text.split()
        return " ".join(words[1::2][::-1] + words[0::2])

    return [turned(text) for text in GOOD]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_tells_sentences_from_shuffled_ones(shuffled: list[str], dtype: str) -> None:
    reward = Fluency("smollm2-135m", mean=True, see_prompt=False, dtype=dtype)
    prompt = Prompt("p", "", [])
    texts = GOOD + shuffled
    views = [View(text, text, prompt, {}, done=True) for text in texts]
    scores = reward.extend([reward.start(prompt) for _ in texts], views)
    assert max(scores[8:]) < min(scores[:8])
    assert all(good > bad + 2 for good, bad in zip(scores[:8], scores[8:], strict=True))
