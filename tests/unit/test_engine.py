"""The decoding engine: the same tokens and log-probabilities as a plain model, whatever is decoded beside a text."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import instant_reward as ir
from instant_reward.batch import collate
from instant_reward.data import to_prompts
from instant_reward.policies.causal import CausalPolicy
from instant_reward.rewards.base import as_reward
from instant_reward.sampling import engine as engine_module
from instant_reward.sampling.draw import Settings
from instant_reward.sampling.engine import Engine
from instant_reward.sampling.sampler import in_order
from instant_reward.types import Prompt, RewardError, Rollout, UserError
from tiny import CONTEXT, END, exact, shared_tokenizer, tiny_config, tiny_gpt2, tiny_llama, tiny_policy

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
TEXTS = ["the movie was", "a", " good, but not", "the long and slow movie was of a film that", "It was bad.\n\n"]


def model_with_many_ends(kind: str) -> Any:
    """Every eighth token ends a text, so that texts leave and join at all times."""
    model = MODELS[kind]()
    model.generation_config.eos_token_id = list(range(3, len(shared_tokenizer()), 8))
    return model


@pytest.fixture(scope="module", params=MODELS)
def policy(request: pytest.FixtureRequest) -> CausalPolicy:
    return tiny_policy(model_with_many_ends(request.param))


@pytest.fixture(scope="module")
def llama() -> CausalPolicy:
    return tiny_policy(model_with_many_ends("llama"))


def prompts(texts: Sequence[str] = TEXTS) -> list[Prompt]:
    return to_prompts([{"prompt": text, "id": repr(text)} for text in texts], shared_tokenizer())


def sample(
    policy: CausalPolicy,
    asked: Sequence[Prompt] | None = None,
    per_prompt: int = 3,
    rewards: Sequence[Any] = (),
    seed: int = 0,
    step: int = 0,
    **settings: Any,
) -> list[Rollout]:
    engine = Engine(policy, Settings(**{"max_new_tokens": 20, **settings}))
    return in_order(engine.stream(prompts() if asked is None else asked, per_prompt, rewards, seed, step))


def sampled(rollout: Rollout) -> list[int]:
    return rollout.token_ids[rollout.start :]


def assert_same_texts(some: Sequence[Rollout], others: Sequence[Rollout]) -> None:
    """The same but for the rounding of log-probabilities and the numbers of the groups."""
    by_id = {other.id: other for other in others}
    assert len(by_id) == len(others)
    for one in some:
        other = by_id[one.id]
        assert replace(one, group=0, logprobs=[]) == replace(other, group=0, logprobs=[])
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)


def stop_where(text: str, every: Any = "token") -> Any:
    """A reward that ends a text where its newest piece holds ``text``."""
    return ir.reward(every=every, name="stops")(lambda view: ir.stop(-1) if text in view.piece else 0.25)


def letter_of_some(policy: CausalPolicy, **settings: Any) -> str:
    """A letter that some texts hold, and some do not."""
    texts = [rollout.text for rollout in sample(policy, **settings)]
    holds = {letter: sum(letter in text for text in texts) for letter in "abcdefghijklmnopqrstuvwxyz"}
    return min(holds, key=lambda letter: abs(holds[letter] - len(texts) / 2))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("rewards")]


class TestGreedy:
    @pytest.mark.parametrize("rows", [1, 2, 64])
    def test_it_equals_generate_for_left_padded_prompts_of_different_lengths(
        self, policy: CausalPolicy, rows: int
    ) -> None:
        asked = prompts()
        longest = max(len(prompt.token_ids) for prompt in asked)
        padding = [longest - len(prompt.token_ids) for prompt in asked]
        generated = policy.model.generate(
            torch.tensor([[0] * pad + prompt.token_ids for pad, prompt in zip(padding, asked, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding]),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )[:, longest:].tolist()
        ours = [sampled(rollout) for rollout in sample(policy, per_prompt=1, temperature=0.0, rows=rows)]
        assert len({len(text) for text in ours}) > 2, "texts should end at different times, or nothing leaves and joins"
        for mine, theirs in zip(ours, generated, strict=True):
            assert mine == theirs[: len(mine)]
            assert len(mine) == 20 or mine[-1] in policy.end_ids

    def test_its_choices_are_certain(self, llama: CausalPolicy) -> None:
        assert {value for rollout in sample(llama, temperature=0.0) for value in rollout.logprobs} == {0.0}


def plain_logprobs(policy: CausalPolicy, rollout: Rollout, **settings: Any) -> Tensor:
    """The log-probability of each sampled token from one plain forward pass, by transformers' own processors."""
    with torch.no_grad():
        logits = policy.model(torch.tensor([rollout.token_ids])).logits[0, rollout.start - 1 : -1]
    logits[: settings.get("min_new_tokens", 0), list(policy.end_ids)] = -torch.inf
    processors = LogitsProcessorList([TemperatureLogitsWarper(settings.get("temperature", 1.0))])
    if "top_k" in settings:
        processors.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    logprobs = processors(None, logits).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(sampled(rollout))[:, None]).squeeze(1)


class TestLogProbabilities:
    @pytest.mark.parametrize("rows", [3, 64])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"temperature": 0.6},
            {"top_k": 9},
            {"top_p": 0.7},
            {"min_new_tokens": 6},
            {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_new_tokens": 3},
        ],
        ids=str,
    )
    def test_they_are_those_of_a_plain_forward_pass(
        self, policy: CausalPolicy, settings: dict[str, Any], rows: int
    ) -> None:
        for rollout in sample(policy, rows=rows, **settings):
            expected = plain_logprobs(policy, rollout, **settings)
            assert torch.isfinite(expected).all()
            assert rollout.logprobs[: rollout.start] == [0.0] * rollout.start
            assert rollout.logprobs[rollout.start :] == pytest.approx(expected.tolist(), abs=1e-9)

    @pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "min_new_tokens": 6}], ids=str)
    def test_they_are_the_trainers(self, policy: CausalPolicy, settings: dict[str, Any]) -> None:
        batch = collate(sample(policy, **settings), dtype=torch.float64)
        with torch.no_grad():
            found = policy(batch).logprobs
        assert torch.allclose(found, batch.old_logprobs, rtol=0, atol=1e-9)

    def test_up_to_the_last_token_of_the_context(self, policy: CausalPolicy) -> None:
        long = Prompt("long", "x", [5 + number % 90 for number in range(CONTEXT - 20)])
        (rollout,) = sample(policy, [long], per_prompt=1, min_new_tokens=20)
        assert len(rollout.token_ids) == CONTEXT
        expected = plain_logprobs(policy, rollout, min_new_tokens=20)
        assert rollout.logprobs[rollout.start :] == pytest.approx(expected.tolist(), abs=1e-9)

    def test_attention_that_slides_is_exact_within_its_window_and_goes_no_further(self) -> None:
        model = exact(MistralForCausalLM(MistralConfig(**tiny_config(sliding_window=24))).double())
        policy = tiny_policy(model)
        assert policy.context == 24
        rollouts = policy.sample(["the movie was", "a"], per_prompt=3, max_new_tokens=16)
        for rollout in rollouts:
            expected = plain_logprobs(policy, rollout)
            assert rollout.logprobs[rollout.start :] == pytest.approx(expected.tolist(), abs=1e-9)
        with pytest.raises(UserError, match="prompt of 25 tokens, and only 8 fit"):
            policy.sample(["x" * 25], max_new_tokens=16)


class TestEnds:
    def test_a_text_ends_with_its_end_token_and_does_not_show_it(self) -> None:
        policy = tiny_policy()
        rollouts = sample(policy, per_prompt=8, seed=1)
        ended = [rollout for rollout in rollouts if rollout.stop == "ended"]
        assert ended
        for rollout in ended:
            assert rollout.token_ids[-1] == shared_tokenizer().eos_token_id
            assert END not in rollout.text
        for rollout in rollouts:
            assert not set(sampled(rollout)[:-1]) & set(policy.end_ids)
            assert rollout.stop == ("ended" if rollout.token_ids[-1] in policy.end_ids else "length")

    def test_no_text_is_longer_than_asked_for(self, llama: CausalPolicy) -> None:
        rollouts = sample(llama, max_new_tokens=7)
        assert max(len(sampled(rollout)) for rollout in rollouts) == 7
        assert {rollout.stop for rollout in rollouts} == {"ended", "length"}

    def test_below_min_new_tokens_the_end_is_not_drawn(self, llama: CausalPolicy) -> None:
        rollouts = sample(llama, min_new_tokens=9)
        lengths = [len(sampled(rollout)) for rollout in rollouts]
        assert 10 in lengths
        assert min(lengths) == 10  # the end token itself can be the tenth
        for rollout in rollouts:
            assert rollout.forbidden_end == 9
            assert not set(sampled(rollout)[:9]) & set(llama.end_ids)

    def test_a_stop_string_ends_the_text_with_the_token_that_completes_it(self) -> None:
        policy = tiny_policy()
        free = {rollout.id: rollout for rollout in sample(policy, per_prompt=6)}
        some = next(rollout for rollout in free.values() if rollout.stop == "length")
        middle = some.char_ends[some.start + 8]
        stop = some.text[middle - 2 : middle + 2]
        assert some.text.find(stop) == middle - 2
        assert any(middle - 2 < end < middle + 2 for end in some.char_ends), "it should lie over several tokens"
        met = 0
        for rollout in sample(policy, per_prompt=6, stop=("nowhere to be found", stop)):
            before = free[rollout.id]
            if stop not in before.text:
                assert_same_texts([rollout], [before])
                continue
            met += 1
            assert rollout.stop == "ended"
            assert stop in rollout.text
            assert rollout.token_ids == before.token_ids[: len(rollout.token_ids)]
            first = before.text.find(stop) + len(stop)
            assert rollout.char_ends[-2] < first <= rollout.char_ends[-1]
        assert met

    def test_stop_strings_may_be_given_to_sample_as_one_string(self) -> None:
        policy = tiny_policy()
        one, several = (policy.sample(TEXTS, stop=stop, min_new_tokens=20) for stop in (" m", [" m"]))
        assert one == several
        assert any(rollout.text.endswith(" m") for rollout in one)


class TestSeeds:
    def test_the_same_seed_gives_the_same_texts(self, llama: CausalPolicy) -> None:
        assert sample(llama, seed=5, step=2) == sample(llama, seed=5, step=2)

    def test_another_seed_or_step_gives_others(self, llama: CausalPolicy) -> None:
        texts = [
            tuple(tuple(sampled(rollout)) for rollout in sample(llama, seed=seed, step=step, min_new_tokens=20))
            for seed, step in ((0, 0), (1, 0), (0, 1))
        ]
        assert len(set(texts)) == 3

    def test_siblings_and_prompts_given_twice_are_drawn_apart(self, llama: CausalPolicy) -> None:
        twice = prompts([TEXTS[0], TEXTS[0]])
        assert len({tuple(sampled(rollout)) for rollout in sample(llama, twice, min_new_tokens=20)}) == 6

    @pytest.mark.parametrize("rows", [1, 2, 7])
    def test_a_text_does_not_depend_on_how_many_are_decoded_beside_it(self, policy: CausalPolicy, rows: int) -> None:
        assert_same_texts(sample(policy, rows=rows), sample(policy, rows=64))

    def test_a_text_does_not_depend_on_the_order_of_the_prompts(self, policy: CausalPolicy) -> None:
        assert_same_texts(sample(policy, prompts(TEXTS[::-1]), rows=4), sample(policy, rows=4))

    def test_a_text_does_not_depend_on_how_many_siblings_and_prompts_there_are(self, policy: CausalPolicy) -> None:
        assert_same_texts(sample(policy, prompts(TEXTS[2:3]), per_prompt=2), sample(policy, per_prompt=5))

    def test_a_text_does_not_depend_on_the_longest_one_allowed(self, llama: CausalPolicy) -> None:
        for short, long in zip(sample(llama, max_new_tokens=6), sample(llama, max_new_tokens=12), strict=True):
            assert sampled(short) == sampled(long)[:6]


class TestRollouts:
    def test_siblings_share_a_group_and_lie_side_by_side(self, llama: CausalPolicy) -> None:
        rollouts = llama.sample(TEXTS, per_prompt=3)
        assert [rollout.group for rollout in rollouts] == [number for number in range(5) for _ in range(3)]
        assert [rollout.prompt.text for rollout in rollouts] == [text for text in TEXTS for _ in range(3)]
        assert len({rollout.id for rollout in rollouts}) == 15

    def test_they_say_which_tokens_were_sampled_by_which_version(self, llama: CausalPolicy) -> None:
        engine = Engine(llama, Settings(max_new_tokens=5), version=3)
        engine.load(llama, version=4)
        for rollout in engine.stream(prompts(), 1):
            start, length = rollout.start, len(rollout.token_ids)
            assert rollout.mask == [False] * start + [True] * (length - start)
            assert rollout.versions == [-1] * start + [4] * (length - start)
            assert len(rollout.logprobs) == len(rollout.char_ends) == length

    def test_the_text_is_that_of_the_sampled_tokens(self, policy: CausalPolicy) -> None:
        for rollout in sample(policy, per_prompt=6):
            ids = sampled(rollout)
            assert rollout.text == shared_tokenizer().decode(ids, skip_special_tokens=True)
            assert rollout.char_ends[-1] == len(rollout.text)

    def test_they_come_as_they_finish(self, llama: CausalPolicy) -> None:
        engine = Engine(llama, Settings(max_new_tokens=20, rows=2))
        stream = engine.stream(prompts(), 3)
        next(stream)
        assert engine.count.decoded < 20
        assert len(list(stream)) == 14

    def test_no_prompts_give_no_texts(self, llama: CausalPolicy) -> None:
        assert llama.sample([]) == []

    def test_columns_of_the_data_come_along(self, llama: CausalPolicy) -> None:
        (rollout,) = llama.sample([{"prompt": "the movie", "answer": 7}], rewards=[lambda view: view.info["answer"]])
        assert rollout.info == {"answer": 7}
        assert rollout.total() == 7.0

    def test_messages_go_through_the_chat_template(self, llama: CausalPolicy) -> None:
        messages = [{"role": "user", "content": "Was it good?"}]
        (rollout,) = llama.sample([messages])
        assert rollout.prompt.text == "user: Was it good?\nassistant:"
        assert rollout.prompt.messages == messages


class Prefills:
    """Counts which prompts an engine reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        plain = Engine.prefill

        def counted(engine: Engine, asked: Sequence[Prompt]) -> Any:
            self.calls.append([prompt.text for prompt in asked])
            return plain(engine, asked)

        monkeypatch.setattr(Engine, "prefill", counted)


class TestPrefill:
    def test_prompts_are_read_together_and_once_for_all_siblings(
        self, llama: CausalPolicy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prefills = Prefills(monkeypatch)
        sample(llama, per_prompt=8)
        assert prefills.calls == [TEXTS]

    @pytest.mark.parametrize("rows", [1, 3, 5])
    def test_a_prompt_is_read_once_also_where_its_siblings_come_one_after_the_other(
        self, llama: CausalPolicy, monkeypatch: pytest.MonkeyPatch, rows: int
    ) -> None:
        prefills = Prefills(monkeypatch)
        sample(llama, per_prompt=8, rows=rows)
        assert [text for call in prefills.calls for text in call] == TEXTS

    def test_not_more_tokens_at_once_than_allowed(self, llama: CausalPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        prefills = Prefills(monkeypatch)
        monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 12)
        rollouts = sample(llama)
        lengths = {prompt.text: len(prompt.token_ids) for prompt in prompts()}
        assert [text for call in prefills.calls for text in call] == TEXTS
        assert len(prefills.calls) > 2
        for call in prefills.calls:
            assert len(call) == 1 or len(call) * max(lengths[text] for text in call) <= 12
        monkeypatch.undo()
        assert_same_texts(rollouts, sample(llama))


class TestScoring:
    def test_it_goes_on_while_the_next_tokens_are_decoded_on_another_thread(
        self, llama: CausalPolicy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first score waits until three more tokens were decoded: it would wait for ever if decoding waited."""
        decoded, ahead = [], threading.Event()
        plain = Engine.decode

        def counted(engine: Engine, tokens: list[int], cache: Any) -> Tensor:
            decoded.append(threading.get_ident())
            if len(decoded) == 3:
                ahead.set()
            return plain(engine, tokens, cache)

        monkeypatch.setattr(Engine, "decode", counted)
        scored_by = set()

        def waits(view: ir.View) -> float:
            scored_by.add(threading.get_ident())
            assert ahead.wait(timeout=30), "no token was decoded meanwhile"
            return 1.0

        sample(llama, rewards=[ir.reward(every="token")(waits)], min_new_tokens=20)
        assert set(decoded) == {threading.get_ident()}
        assert len(scored_by) == 1
        assert scored_by != set(decoded)

    @pytest.mark.parametrize("kind", ["never stops", "final", "change"])
    def test_nothing_waits_for_a_reward_that_never_stops_a_text(
        self, llama: CausalPolicy, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        """All tokens are decoded before its first score is known, whatever the lag."""
        decoded, ahead = [], threading.Event()
        plain = Engine.decode

        def counted(engine: Engine, tokens: list[int], cache: Any) -> Tensor:
            decoded.append(len(tokens))
            if len(decoded) == 19:
                ahead.set()
            return plain(engine, tokens, cache)

        def waits(text: str) -> float:
            assert not text or ahead.wait(timeout=30), "decoding waited"
            return float(len(text))

        reward = {
            "never stops": ir.reward(every="token", name="waits", stops=False)(lambda view: waits(view.text)),
            "final": as_reward(waits),
            "change": ir.change(waits, every="token"),
        }[kind]
        asked, settings = prompts(["a"]), {"min_new_tokens": 20, "stop_lag": 0}
        reference = sample(llama, asked, 2, **settings)
        decoded.clear()
        ahead.clear()
        monkeypatch.setattr(Engine, "decode", counted)
        found = sample(llama, asked, 2, [reward], **settings)
        assert [sampled(one) for one in found] == [sampled(one) for one in reference]
        assert all(one.marks for one in found)

    def test_a_stop_that_was_ruled_out_is_an_error(self, llama: CausalPolicy) -> None:
        reward = ir.reward(every="token", name="hasty", stops=False)(lambda view: ir.stop(1.0))
        with pytest.raises(RewardError, match=r"hasty.*stops=False; leave that out"):
            sample(llama, rewards=[reward], min_new_tokens=20)

    def test_marks_are_the_same_however_slow_the_reward(self, policy: CausalPolicy) -> None:
        chance = random.Random(0)
        letter = letter_of_some(policy, rows=4, min_new_tokens=16)

        def sleepy(view: ir.View) -> Any:
            time.sleep(chance.choice([0, 0, 0, 0.004]))
            return ir.stop(-1) if letter in view.piece else len(view.text)

        def quick(view: ir.View) -> Any:
            return ir.stop(-1) if letter in view.piece else len(view.text)

        runs = [
            sample(policy, rewards=[ir.reward(every="token", name="it")(function)], rows=4, min_new_tokens=16)
            for function in (sleepy, quick)
        ]
        assert {rollout.stop for rollout in runs[0]} >= {"stopped", "ended"}
        assert runs[0] == runs[1]

    def test_batched_rewards_see_all_texts_of_a_step(self, llama: CausalPolicy) -> None:
        sizes: list[int] = []

        @ir.reward(every="token", batched=True)
        def count(views: list[ir.View]) -> list[float]:
            sizes.append(len(views))
            return [0.0] * len(views)

        sample(llama, rewards=[count], per_prompt=2, min_new_tokens=20)
        assert max(sizes) == 10

    def test_a_stop_cuts_where_it_was_seen_whatever_the_lag(self, policy: CausalPolicy) -> None:
        letter = letter_of_some(policy, min_new_tokens=20)
        rewards = [stop_where(letter), ir.reward(every="word", name="words")(lambda view: len(view.piece))]
        reference = sample(policy, rewards=rewards, stop_lag=0, min_new_tokens=20)
        stopped = [rollout for rollout in reference if rollout.stop == "stopped"]
        assert len(stopped) > 3
        for rollout in stopped:
            last = next(mark for mark in rollout.marks if mark.value == -1)
            assert last.seen == len(rollout.token_ids)
            assert letter in rollout.text[rollout.char_ends[-2] :]
            assert letter not in rollout.text[: rollout.char_ends[-2]]
        for lag in (1, 4, 30):
            assert_same_texts(sample(policy, rewards=rewards, stop_lag=lag, min_new_tokens=20, rows=6), reference)

    def test_a_stop_on_a_word_keeps_the_token_that_showed_its_end(self, policy: CausalPolicy) -> None:
        letter = letter_of_some(policy, min_new_tokens=20)
        rollouts = sample(policy, rewards=[stop_where(letter, every="word")], min_new_tokens=20)
        stopped = [rollout for rollout in rollouts if rollout.stop == "stopped"]
        assert stopped
        for rollout in stopped:
            last = rollout.marks[-1]
            assert last.value == -1
            assert last.seen == len(rollout.token_ids)
        assert any(rollout.marks[-1].end < len(rollout.token_ids) for rollout in stopped)

    def test_a_text_that_ends_with_the_token_a_reward_stops_it_at_has_ended(self, llama: CausalPolicy) -> None:
        rollouts = sample(llama, max_new_tokens=7, rewards=[ir.reward()(lambda view: ir.stop(2.0))])
        assert {rollout.stop for rollout in rollouts} == {"ended", "stopped"}  # none counts as cut off
        assert {rollout.total() for rollout in rollouts} == {2.0}

    @pytest.mark.parametrize("lag", [0, 4])
    def test_the_tokens_that_a_stop_saves_are_counted(self, lag: int) -> None:
        engine = Engine(tiny_policy(), Settings(max_new_tokens=20, min_new_tokens=20, stop_lag=lag))
        third = ir.reward(every=3)(lambda view: ir.stop())
        rollouts = list(engine.stream(prompts(), 2, [third]))
        kept = sum(len(sampled(rollout)) for rollout in rollouts)
        assert engine.count.kept == kept
        assert engine.count.decoded == kept + 10 * lag
        assert engine.count.saved == 10 * 20 - engine.count.decoded

    def test_a_text_that_had_ended_before_its_stop_was_known_saved_nothing(self) -> None:
        engine = Engine(tiny_policy(), Settings(max_new_tokens=6, min_new_tokens=4, stop_lag=10))
        rollouts = list(engine.stream(prompts(), 2, [ir.reward(every=3)(lambda view: ir.stop())]))
        assert "stopped" in {rollout.stop for rollout in rollouts}
        assert engine.count.saved == 0

    def test_a_stopped_row_makes_room_for_a_waiting_text(self, llama: CausalPolicy) -> None:
        engine = Engine(llama, Settings(max_new_tokens=20, min_new_tokens=20, rows=2, stop_lag=2))
        rollouts = list(engine.stream(prompts(), 2, [ir.reward(every=3)(lambda view: ir.stop())]))
        assert len(rollouts) == 10
        assert engine.count.decoded < 10 * 20


class TestThreads:
    @pytest.fixture(autouse=True)
    def _none_is_left(self) -> Iterator[None]:
        assert threads() == []
        yield
        assert threads() == []

    def test_a_finished_stream_leaves_no_thread(self, llama: CausalPolicy) -> None:
        list(Engine(llama, Settings()).stream(prompts(), 2, [len]))

    def test_a_stream_that_is_given_up_leaves_no_thread(self, llama: CausalPolicy) -> None:
        stream = Engine(llama, Settings(max_new_tokens=20)).stream(prompts(), 3, [len])
        next(stream)
        assert threads()
        stream.close()  # type: ignore[attr-defined]

    def test_a_stream_that_is_forgotten_leaves_no_thread(self, llama: CausalPolicy) -> None:
        for rollout in Engine(llama, Settings(max_new_tokens=20)).stream(prompts(), 3, [len]):
            assert rollout.total() == len(rollout.text)
            break

    def test_after_an_error_nothing_more_is_scored(self, llama: CausalPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded, ahead, scored = [], threading.Event(), []
        plain = Engine.decode

        def counted(engine: Engine, tokens: list[int], cache: Any) -> Tensor:
            decoded.append(len(tokens))
            if len(decoded) == 7:
                ahead.set()
            return plain(engine, tokens, cache)

        def fails(view: ir.View) -> float:
            scored.append(view.piece)
            if len(scored) > 1:
                time.sleep(0.5)  # long enough for the error of the first one to be seen
                return 0.0
            assert ahead.wait(timeout=60)
            raise ArithmeticError

        monkeypatch.setattr(Engine, "decode", counted)
        with pytest.raises(RewardError, match="raised ArithmeticError"):
            sample(llama, prompts(["a"]), 1, [ir.reward(every="token")(fails)], min_new_tokens=20, stop_lag=8)
        assert len(decoded) >= 8
        assert len(scored) < 8

    def test_a_failing_reward_surfaces_as_what_it_is(self, llama: CausalPolicy) -> None:
        def broken(text: str) -> float:
            raise OSError("no lexicon")

        with pytest.raises(
            RewardError, match=r"reward 'broken' on prompt '.*' .* at step 8 raised OSError: no lexicon"
        ):
            sample(llama, rewards=[broken], step=8)

    def test_a_reward_that_is_no_number_surfaces(self, llama: CausalPolicy) -> None:
        with pytest.raises(RewardError, match="gave nan"):
            llama.sample(TEXTS, rewards=[lambda text: float("nan")])

    def test_an_error_in_the_loop_around_the_stream_leaves_no_thread(self, llama: CausalPolicy) -> None:
        def consume() -> None:
            for _ in Engine(llama, Settings()).stream(prompts(), 3, [len]):
                raise RuntimeError("elsewhere")

        with pytest.raises(RuntimeError, match="elsewhere"):
            consume()


class TestRefusals:
    def test_a_prompt_longer_than_the_context(self, llama: CausalPolicy) -> None:
        with pytest.raises(UserError, match=rf"prompt 1 has a prompt of 120 tokens, and only {CONTEXT - 20} fit"):
            llama.sample(["a", "x" * 120], max_new_tokens=20)

    def test_an_empty_prompt(self, llama: CausalPolicy) -> None:
        with pytest.raises(UserError, match="prompt 1 has an empty prompt"):
            llama.sample(["a", ""])

    @pytest.mark.parametrize("asked", ["the movie", {"prompt": "the movie"}], ids=["string", "mapping"])
    def test_prompts_that_are_no_list(self, llama: CausalPolicy, asked: Any) -> None:
        with pytest.raises(UserError, match=r"prompts must be a list, not one (str|dict); wrap it in \[ \]"):
            llama.sample(asked)

    def test_no_text_a_prompt(self, llama: CausalPolicy) -> None:
        with pytest.raises(UserError, match="per_prompt=0 must be at least 1"):
            llama.sample(["a"], per_prompt=0)


def test_a_stop_on_the_last_token_allowed_is_replayed_as_it_was_seen(llama: CausalPolicy) -> None:
    """Live, the text is done there: a reward must hear the same when the finished text is scored again."""
    heard: list[bool] = []

    def listens(view: ir.View) -> Any:
        heard.append(view.done)
        return ir.stop(1.0) if view.sampled == 6 else float(view.done)

    reward = ir.reward(every="token", name="listens")(listens)
    found = sample(llama, prompts(["a"]), 4, [reward], max_new_tokens=6, min_new_tokens=6, stop_lag=0)
    live = heard.count(True)
    heard.clear()
    assert [ir.replay([reward], one) for one in found] == [one.marks for one in found]
    assert heard.count(True) == live == len(found)
    assert all(one.at_limit and one.stop == "stopped" for one in found)
