"""Novelty and random network distillation: what they pay, what they remember of the run, and when they learn it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

import instant_reward as ir
from instant_reward.assemble import build_rewards
from instant_reward.config import RewardConfig
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.curiosity import Novelty, RandomDistillation, Running
from instant_reward.rewards.watch import Watch
from instant_reward.text import TextDecoder
from instant_reward.types import Prompt, Rollout, UserError, View
from tiny import END, exact, shared_tokenizer, tiny_folder, tiny_llama, tiny_tokenizer

TOKENIZER = shared_tokenizer()
PROMPT = Prompt("p", "So:", [1, 2])
PIECES = [
    " good",
    " movie",
    ". ",
    "\n\n",
    " ",
    "o",
    "你",
    "你好。",
    "é",
    "👍🏽",
    " 4",
    "e\u0301",
    "\n",
    " the",
    "m",
    " Good",
]
WEIRD = [
    "",
    "cat",
    " \n\t\u3000 ",
    "the cat sat on 42 mats. " * 400,
    "👍🏽👨‍👩‍👧" * 5,
    "مرحبا، كيف",
    "\x00\x1b[31m\u202e",
    "\ud83d x",
]
WEIRD += ["今天天气很好。一共42个。"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("model"), tiny_llama(max_position_embeddings=1024)))


def view(text: str, piece: str, done: bool = False) -> View:
    return View(text, piece, PROMPT, {}, done)


def by_piece(reward: Any, pieces: Sequence[str]) -> list[Any]:
    state, text, paid = reward.start(PROMPT), "", []
    for number, piece in enumerate(pieces):
        text += piece
        paid += reward.extend([state], [view(text, piece, number + 1 == len(pieces))])
    return paid


def total(reward: Any, *pieces: str) -> float:
    return sum(span.value for spans in by_piece(reward, pieces) for span in spans)


def values(reward: Any, *pieces: str) -> list[list[float]]:
    return [[round(span.value, 6) for span in spans] for spans in by_piece(reward, pieces)]


def wrote(*texts: str) -> list[Rollout]:
    return [Rollout(str(i), 0, PROMPT, [], [], [], [], text, [], [], "ended") for i, text in enumerate(texts)]


def near(value: Any) -> Any:
    return pytest.approx(value, abs=1e-6)


class TestNovelty:
    def test_an_ngram_is_worth_less_the_more_often_the_run_wrote_it(self) -> None:
        reward = Novelty(2)
        assert total(reward, "a b c") == 3.0
        reward.observe(wrote("a b c", "A b!", "z"))
        # (start, a) was there twice, (a, b) twice, (b, c) once, (c, d) never.
        assert values(reward, "a", " b", " c", " d") == [[near(3**-0.5)], [near(3**-0.5)], [near(2**-0.5)], [1.0]]

    def test_what_the_text_itself_had_before_counts_too(self) -> None:
        assert values(Novelty(1), "a", " b", " a", " A.") == [[1.0], [1.0], [near(2**-0.5)], [near(3**-0.5)]]

    def test_while_a_step_runs_it_only_reads(self) -> None:
        reward = Novelty(1)
        assert total(reward, "a b") == total(reward, "a b") == 2.0

    def test_a_word_that_goes_on_is_another_word(self) -> None:
        reward = Novelty(1)
        reward.observe(wrote("mov mov mov"))
        first, second, third = by_piece(reward, ["mov", "ie", " mov"])
        assert [span.value for span in first] == near([0.5])
        assert [(span.value, span.start, span.end) for span in second] == [(near(0.5), 0, 5)]
        assert [(span.value, span.start, span.end) for span in third] == [(near(0.5), 5, 9)]

    def test_characters_without_spaces_are_words(self) -> None:
        reward = Novelty(2)
        reward.observe(wrote("你好"))
        assert total(reward, "你好吗") == near(2 * 2**-0.5 + 1)

    def test_tokens_of_a_tokenizer(self, folder: str) -> None:
        reward = Novelty(2, unit="token", model=folder)
        reward.observe(wrote(" good movie"))
        (spans,) = by_piece(reward, [" good movie was"])
        assert [(span.start, span.end) for span in spans] == [(0, 5), (5, 11), (11, 15)]
        assert [span.value for span in spans] == near([2**-0.5, 2**-0.5, 1.0])

    @pytest.mark.parametrize("unit", ["word", "token"])
    def test_what_goes_without_saying_earns_nothing(self, folder: str, unit: str) -> None:
        reward = Novelty(1, unit=unit, model=folder, surprising=True, dtype="float64")
        assert reward._scorer is not None
        model = exact(reward._scorer.frozen.model)
        words = [" the", " movie", " was", " good", " slow", " not", " fine", " bad"]
        text, expected = "", []
        for _ in range(12):  # now and then the likeliest token follows
            ids = TOKENIZER("So:" + text)["input_ids"]
            likeliest = TOKENIZER.decode([int(model(torch.tensor([ids])).logits[0, -1].argmax())])
            said = likeliest if likeliest in words and len(expected) % 2 else words[len(expected) % len(words)]
            expected.append(said != likeliest)
            text += said
        assert True in expected
        assert False in expected
        plain = Novelty(1, unit=unit, model=folder if unit == "token" else None)
        all_of_it = [span for spans in by_piece(plain, [text]) for span in spans]
        kept = [span for span, surprise in zip(all_of_it, expected, strict=True) if surprise]
        assert by_piece(reward, [text]) == [kept]

    def test_a_word_whose_tokens_change_is_judged_again(self, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()  # one that joins a full stop and the space after it
        tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        reward = Novelty(1, model=str(tiny_folder(tmp_path / "model", tiny_llama(), tokenizer)), surprising=True)
        (joined,) = tokenizer(". ")["input_ids"]
        assert reward._scorer is not None
        reward._scorer.measure = lambda logits, following: (following == joined).long()
        assert values(reward, " good", ".", " ") == [[], [], [1.0]]

    def test_the_mean_is_that_of_the_words_of_the_piece(self) -> None:
        reward = Novelty(1, mean=True)
        assert by_piece(reward, ["a b", " a c", " ", " a"]) == [1.0, near((2**-0.5 + 1) / 2), None, near(3**-0.5)]

    def test_it_decays_with_each_step(self) -> None:
        reward = Novelty(1, decay=0.5)
        for step in range(3):
            assert total(reward, "a b") == 2 * 0.5**step
            reward.observe(wrote("z"))

    def test_a_checkpoint_goes_on(self) -> None:
        first, second = Novelty(2, decay=0.9), Novelty(2, decay=0.9)
        first.observe(wrote("a b c a b", "\ud83d 你好"))
        second.load_state_dict(stored(first.state_dict()))
        for reward in (first, second):
            reward.observe(wrote("a b"))
        assert values(second, "a b c", " d") == values(first, "a b c", " d")
        with pytest.raises(UserError, match="counted 2-grams of words, and this run's reward counts 3-grams"):
            Novelty(3).load_state_dict(first.state_dict())

    @pytest.mark.parametrize("kind", ["words", "tokens", "surprising"])
    @given(st.lists(st.sampled_from(PIECES), max_size=10), st.integers(1, 3))
    @settings(max_examples=12)
    def test_at_every_prefix_the_sum_is_that_of_the_text_so_far(
        self, folder: str, kind: str, pieces: list[str], n: int
    ) -> None:
        made: dict[str, dict[str, Any]] = {
            "words": {},
            "tokens": {"unit": "token", "model": folder},
            "surprising": {"model": folder, "surprising": True, "dtype": "float64"},
        }
        reward = Novelty(n, **made[kind])
        reward.observe(wrote(" good movie. 你好", "the movie"))
        state, text, paid = reward.start(PROMPT), "", 0.0
        for number, piece in enumerate(pieces):
            text += piece
            (spans,) = reward.extend([state], [view(text, piece, number + 1 == len(pieces))])
            paid += sum(span.value for span in spans)
            assert paid == near(total(reward, text))

    @pytest.mark.parametrize("text", WEIRD)
    def test_weird_texts(self, folder: str, text: str) -> None:
        words, tokens, mean = Novelty(), Novelty(unit="token", model=folder), Novelty(mean=True)
        for reward in (words, tokens, mean):
            reward.observe(wrote(text))
        assert all(0 < span.value <= 1 for span in by_piece(words, [text])[0])
        assert all(0 < span.value <= 4 for span in by_piece(tokens, [text])[0])  # up to four bytes of one character
        assert by_piece(mean, [text])[0] is None or 0 < by_piece(mean, [text])[0] <= 1

    def test_live_equals_replay_with_what_was_known_then(self) -> None:
        reward = Novelty(2)
        reward.observe(wrote("the good movie"))
        known = stored(reward.state_dict())
        rewards = [as_reward(reward).but(every=every, name=str(every)) for every in ("token", "word", "end")]
        ids = TOKENIZER(" the good movie was the good movie 你好" + END)["input_ids"]
        watch = Watch(rewards, TextDecoder(TOKENIZER))
        watch.open(0, PROMPT)
        watch.feed(0, ids, done=True)
        text, ends, marks = watch.close(0)
        count = len(ends)
        mask = [False, False] + [True] * (count - 2)
        rollout = Rollout("r", 0, PROMPT, [1, 2, *ids], mask, [0.0] * count, ends, text, marks, [0] * count, "ended")
        reward.observe([rollout])
        assert ir.replay(rewards, rollout) != marks
        reward.load_state_dict(known)
        assert ir.replay(rewards, rollout) == marks
        sums = [rollout.total(one.name) for one in rewards]
        assert sums == near([sums[0]] * 3)

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ({"n": 0}, "n=0"),
            ({"unit": "line"}, "unit='line'"),
            ({"unit": "token"}, "a model is needed"),
            ({"surprising": True}, "a model is needed"),
            ({"model": "smollm2-135m"}, "a model is needed .* only there"),
            ({"decay": 0}, "decay=0"),
            ({"mean": 1}, "mean=1"),
        ],
    )
    def test_arguments_that_are_none(self, args: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said):
            Novelty(**args)


def stored(state: dict[str, Any]) -> Any:
    """Through a file, as checkpoints are."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture
def distilled(folder: str) -> RandomDistillation:
    return RandomDistillation(folder, width=16, dtype="float64", epochs=3)


KNOWN = [" the movie was good", " a good movie", " the movie was slow and long"]


class TestRandomDistillation:
    def test_the_first_step_sets_the_scales_and_pays_nothing(self, distilled: RandomDistillation) -> None:
        assert distilled.score(KNOWN[0], "So:") == 0.0
        distilled.observe(wrote(*KNOWN))
        assert distilled.score(KNOWN[0], "So:") > 0.0

    def test_what_was_learned_is_worth_less_than_what_is_new(self, distilled: RandomDistillation) -> None:
        distilled.observe(wrote(*KNOWN))
        distilled.mean = True
        new = "-42 zq, 你! xk"
        before = distilled.score(KNOWN[0], "So:"), distilled.score(new, "So:")
        for _ in range(25):
            distilled.observe(wrote(*KNOWN))
        after = distilled.score(KNOWN[0], "So:"), distilled.score(new, "So:")
        assert after[0] < before[0] / 4
        assert after[1] > 4 * after[0]

    def test_it_is_the_networks_error_over_the_deviation_of_errors(self, distilled: RandomDistillation) -> None:
        distilled.observe(wrote(*KNOWN))
        states = torch.cat([hidden(distilled, text) for text in KNOWN]).float()
        mean, deviation = states.double().mean(0), states.double().std(0, correction=0)
        inputs = ((hidden(distilled, " good").float() - mean.float()) / deviation.float()).clamp(-5, 5)
        error = (distilled.predictor(inputs) - distilled.target(inputs)).square().mean(-1)
        fresh = RandomDistillation(distilled.frozen.name, width=16, dtype="float64")
        known = ((states - mean.float()) / deviation.float()).clamp(-5, 5)
        errors = (fresh.predictor(known) - fresh.target(known)).square().mean(-1)  # before it learned
        assert distilled.score(" good", "So:") == pytest.approx(
            float((error / errors.std(correction=0)).detach()), rel=1e-4
        )

    def test_while_a_step_runs_it_only_reads(self, distilled: RandomDistillation) -> None:
        distilled.observe(wrote(*KNOWN))
        assert distilled.score(" bad", "So:") == distilled.score(" bad", "So:")

    def test_pieces_have_the_sum_of_the_whole(self, distilled: RandomDistillation) -> None:
        distilled.observe(wrote(*KNOWN))
        text = " the mov" + "ie你好. was"
        paid = by_piece(distilled, [" the mov", "ie你", "好. was"])
        assert sum(span.value for spans in paid for span in spans) == near(distilled.score(text, "So:"))

    def test_a_checkpoint_goes_on_bit_for_bit(self, folder: str) -> None:
        first, second = (RandomDistillation(folder, width=16, dtype="float64", decay=0.9, seed=seed) for seed in (0, 0))
        first.observe(wrote(*KNOWN))
        second.load_state_dict(stored(first.state_dict()))
        for reward in (first, second):
            reward.observe(wrote(" bad", " not a good movie"))
        assert first.score(" it! was", "So:") == second.score(" it! was", "So:")
        with pytest.raises(UserError, match="another size"):
            RandomDistillation(folder, width=8).load_state_dict(first.state_dict())

    def test_the_runs_own_random_numbers_stay_as_they_are(self, folder: str) -> None:
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        RandomDistillation(folder, width=16).observe(wrote(*KNOWN))
        assert torch.equal(torch.rand(2), expected)

    def test_it_decays_with_each_step(self, folder: str) -> None:
        plain, decaying = (RandomDistillation(folder, width=16, dtype="float64", decay=decay) for decay in (1.0, 0.5))
        for step in range(1, 4):
            for reward in (plain, decaying):
                reward.observe(wrote(*KNOWN))
            assert decaying.score(" bad", "So:") == near(0.5**step * plain.score(" bad", "So:"))

    @pytest.mark.parametrize("text", WEIRD)
    def test_weird_texts(self, distilled: RandomDistillation, text: str) -> None:
        distilled.observe(wrote(text, "", " good"))
        assert 0.0 <= distilled.score(text, "So:") < 1e9

    def test_a_step_without_a_token_teaches_nothing(self, distilled: RandomDistillation) -> None:
        distilled.observe(wrote("", ""))
        assert distilled.steps == 1
        assert distilled.score(" good", "So:") == 0.0

    def test_a_config_names_both(self, folder: str) -> None:
        base = "instant_reward.rewards.curiosity"
        new, known = build_rewards(
            [
                RewardConfig(use=f"{base}:Novelty", args={"n": 2}, every="sentence"),
                RewardConfig(use=f"{base}:RandomDistillation", args={"model": folder, "mean": True}),
            ]
        )
        assert [(one.scope, one.every, one.batched) for one in (new, known)] == [
            ("run", "sentence", True),
            ("run", "word", True),
        ]

    @pytest.mark.parametrize("args", [{"width": 0}, {"epochs": True}, {"learning_rate": 0}, {"decay": 2}, {"mean": 3}])
    def test_arguments_that_are_none(self, folder: str, args: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=next(iter(args))):
            RandomDistillation(folder, **args)


def hidden(reward: RandomDistillation, text: str) -> torch.Tensor:
    before, ids = (TOKENIZER(some, add_special_tokens=False)["input_ids"] for some in ("So:", text))
    with torch.no_grad():
        states: torch.Tensor = reward.frozen.trunk(torch.tensor([before + ids])).last_hidden_state[0, len(before) :]
    return states


def test_running_deviations_are_those_of_all_rows() -> None:
    rows = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 100
    running = Running(3)
    for part in rows.split(7):
        running.add(part)
    assert torch.allclose(running.mean, rows.mean(0))
    assert torch.allclose(running.deviation(), rows.std(0, correction=0))


def test_importing_them_needs_no_heavy_library(tmp_path: Path) -> None:
    import subprocess
    import sys

    names = "fluency, reward_model, curiosity, language_model, token_values"
    code = f"import sys\nfrom instant_reward.rewards import {names}\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
