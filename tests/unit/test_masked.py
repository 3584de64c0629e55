"""Masked models as policies: the drafts that rewards see, what may be written where, and texts that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, BertForMaskedLM

import instant_reward as ir
from choosing import WORDS, blank_tokenizer, tiny_masked
from instant_reward.batch import collate
from instant_reward.policies import fills
from instant_reward.policies.kinds import kind_of
from instant_reward.policies.masked import MaskedPolicy
from instant_reward.records import rollout_from_record, rollout_record
from instant_reward.rewards.metrics import Rouge
from instant_reward.types import UserError

ROWS = [{"prompt": "[MASK] b [MASK]", "reference": "a b"}, {"prompt": "[MASK] [MASK] [MASK] c", "reference": "b b"}]


def sampled(edits: bool = False, **options: Any) -> list[ir.Rollout]:
    return tiny_masked(edits=edits).sample(ROWS, **{"per_prompt": 4, "max_new_tokens": 4, **options})


@pytest.mark.parametrize("edits", [False, True])
def test_a_reward_sees_the_whole_text_after_each_fill(edits: bool) -> None:
    seen: dict[str, list[str]] = {}

    @ir.reward(every="token")
    def watching(view: ir.View) -> float:
        assert view.piece == view.text
        seen.setdefault(view.prompt.id + str(view.sampled), []).append(view.text)
        return float(view.text.split().count("b"))

    for rollout in sampled(edits, rewards=[watching]):
        assert rollout.drafts is not None
        assert len(rollout.drafts) == len(rollout.token_ids) == len(rollout.marks)
        assert rollout.text == rollout.drafts[-1]
        for t, mark in enumerate(rollout.marks):
            assert rollout.drafts[t] in seen[rollout.prompt.id + str(t + 1)]
            assert mark.value == rollout.drafts[t].split().count("b")
            assert mark.seen == t + 1
        if not edits:
            assert [draft.count("[MASK]") for draft in rollout.drafts] == list(range(len(rollout.drafts)))[::-1]
            assert rollout.char_ends == [0] * (len(rollout.drafts) - 1) + [len(rollout.text)]
            assert rollout.stop == "ended"


def test_special_tokens_are_never_written_and_fixed_ones_stay() -> None:
    for rollout in sampled(temperature=3.0, per_prompt=32):
        assert set(rollout.text.split()) <= {"a", "b", "c"}
        assert rollout.text.split()[1 if rollout.prompt.text.startswith("[MASK] b") else 3] in ("b", "c")
    edited = sampled(True, temperature=3.0, per_prompt=32)
    assert any(text.text.split()[-1] not in ("c", "[MASK]") for text in edited if text.prompt.text.endswith("c"))
    assert any(text.stop == "ended" for text in edited)
    assert any(text.stop == "length" for text in edited)


def test_metrics_and_changes_follow_a_text_that_is_changed_in_its_middle() -> None:
    rouge = Rouge(1)
    rewards = [ir.change(rouge, every="token", name="change"), rouge, ir.change(len, every="token", name="length")]
    for rollout in sampled(True, rewards=rewards):
        assert rollout.drafts is not None
        scores = [rouge.score(draft, rollout.info["reference"]) for draft in rollout.drafts]
        paid = [mark.value for mark in rollout.marks if mark.source == "change"]
        before = [0.0, *scores[:-1]]
        assert paid == pytest.approx([now - then for now, then in zip(scores, before, strict=True)], abs=1e-12)
        assert rollout.total("rouge_1") == pytest.approx(scores[-1])
        assert rollout.total("length") == len(rollout.text)


def test_a_reward_that_reads_a_growing_text_is_refused_by_the_token_and_works_at_the_end() -> None:
    class Letters:
        """Counts what is new."""

        def start(self, prompt: Any) -> list[int]:
            return [0]

        def extend(self, state: list[int], view: ir.View) -> float:
            new, state[0] = len(view.text) - state[0], len(view.text)
            return float(new)

    with pytest.raises(UserError, match="may change its middle"):
        sampled(rewards=[ir.reward(every="token", name="letters")(Letters())])
    for rollout in sampled(rewards=[ir.reward(every="end", name="letters")(Letters())]):
        assert rollout.total("letters") == len(rollout.text)


def test_stopped_texts_and_spans() -> None:
    @ir.reward(every="token")
    def first(view: ir.View) -> Any:
        return ir.stop(2.0) if view.sampled == 2 else view.span(1.0, 0, len(view.text))

    rewards = [first, ir.reward(every="word", name="words")(lambda view: 1.0)]
    for rollout in sampled(rewards=rewards):
        assert len(rollout.token_ids) == 2
        assert rollout.drafts is not None
        assert rollout.text == rollout.drafts[1]
        spans = [(mark.start, mark.end, mark.value) for mark in rollout.marks if mark.source == "first"]
        assert spans == [(0, 1, 1.0), (1, 2, 2.0)]
        assert rollout.total("words") == len(rollout.text.split())
        assert rollout_from_record(rollout_record(rollout)) == rollout
        assert ir.replay(rewards, rollout) == rollout.marks
    for rollout in sampled():
        whole = rollout.drafts
        ir.replay_groups([first], [rollout])
        assert whole is not None
        assert rollout.drafts == whole[:2]
        assert rollout.text == whole[1]


def test_a_pretrained_model_begins_with_random_order_and_keeps_its_own_words(tmp_path: Path) -> None:
    plain = BertForMaskedLM(tiny_masked().model.config).double()
    folder = tmp_path / "plain"
    plain.save_pretrained(folder)
    blank_tokenizer().save_pretrained(folder)
    assert kind_of(folder) == "masked"
    policy = ir.load_policy(str(folder), dtype="float64")
    assert isinstance(policy, MaskedPolicy)
    assert not policy.slots.edits
    texts = policy.sample([ROWS[1]], per_prompt=200, max_new_tokens=4)
    begun = [(text.token_ids[0] - 1) // policy.slots.vocabulary for text in texts]
    assert all(40 < begun.count(place) < 95 for place in range(3))
    with torch.no_grad():
        ids = torch.tensor([texts[0].context])
        words = plain.eval()(input_ids=ids).logits[0, 1, 5 : len(WORDS)].log_softmax(0)
    first = next(text for text in texts if (text.token_ids[0] - 1) // policy.slots.vocabulary == 0)
    token = (first.token_ids[0] - 1) % policy.slots.vocabulary
    assert first.logprobs[0] == pytest.approx(float(words[token - 5]) - float(torch.tensor(3.0).log()), abs=1e-6)
    again = ir.load_policy(str(tiny_masked(edits=True).save(tmp_path / "edits")))
    assert isinstance(again, MaskedPolicy)
    assert again.slots.edits


def test_texts_that_cannot_be_used_are_named() -> None:
    policy = tiny_masked()

    def told(text: Any, room: int = 4, which: MaskedPolicy = policy) -> str:
        with pytest.raises(UserError) as error:
            which.prompts([{"prompt": "a [MASK]"}, {"prompt": text}], "prompt", room)
        return str(error.value)

    assert "prompt 1 has a text with no [MASK]" in told("a b c")
    with pytest.raises(UserError, match=r"prompt 0 has no column 'prompt' \(it has: text\)"):
        policy.sample([{"text": "a [MASK]"}])
    assert "no token" in told("", which=tiny_masked(edits=True))
    assert "the model reads 16" in told("[MASK] " * 20)
    assert "5 masks" in told("[MASK] " * 5)
    assert "a list for a text" in told([])


def test_texts_that_are_given_are_written_from_left_to_right() -> None:
    policy, editor = tiny_masked(), tiny_masked(edits=True)
    (prompt,) = policy.prompts([ROWS[0]], "prompt", 4)
    size = policy.slots.vocabulary
    assert policy.actions_of("c b a", prompt) == [1 + 7, 1 + size + 5]
    assert editor.actions_of("c b a", prompt) == [1 + 7, 1 + 2 * size + 5, 0]
    for text in ("c c a", "c b", "c b [UNK]"):
        with pytest.raises(UserError):
            policy.actions_of(text, prompt)


@pytest.mark.parametrize("own", [True, False])
def test_an_adapter_learns_beside_the_layer_for_the_places(tmp_path: Path, own: bool) -> None:
    policy = tiny_masked(torch.float32)
    model = policy.model if own else BertForMaskedLM(policy.model.config)
    model.save_pretrained(tmp_path / "model")
    blank_tokenizer().save_pretrained(tmp_path / "model")
    adapted = ir.load_policy(str(tmp_path / "model"), lora={"rank": 2})
    learned = {name for name, one in adapted.model.named_parameters() if one.requires_grad}
    assert {name for name in learned if "lora_" not in name} == {"order.weight", "order.bias"}
    assert "bert.encoder.layer.0.attention.self.query.lora_A.default.weight" in learned
    assert not any("decoder" in name for name in learned)
    assert adapted.model.order.weight.any() == own
    with torch.no_grad():
        for name, one in adapted.model.named_parameters():
            one.add_(0.1 * ("lora_B" in name))  # which a new adapter has at 0
    merged = ir.load_policy(str(adapted.save(tmp_path / "merged")))
    asked: dict[str, Any] = {"token_ids": [[7]], "mask": [[1]], "contexts": [[1, 3, 6, 3, 2]]}
    assert torch.allclose(merged.logprobs(**asked), adapted.logprobs(**asked), atol=1e-5)
    base = ir.load_policy(str(tmp_path / "model"))
    assert not torch.allclose(merged.logprobs(**asked), base.logprobs(**asked), atol=1e-4)
    assert not any("lora_" in name for name, _ in merged.model.named_parameters())
    assert torch.equal(merged.model.order.weight, adapted.model.order.weight)
    with pytest.raises(UserError, match=r"model\.lora\.targets: an adapter on the output head"):
        ir.load_policy(str(tmp_path / "model"), lora={"rank": 2, "targets": ["decoder", "query"]})


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    policy = tiny_masked()
    tokenizer = blank_tokenizer()
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    with pytest.raises(UserError, match="no string ends it"):
        sampled(stop=["b"])
    with pytest.raises(UserError, match="no mask token"):
        MaskedPolicy(policy.model, bare, torch.float64)


def like(shape: str, **changes: Any) -> Any:
    """A masked model of another shape, for the same tokenizer."""
    tokenizer = blank_tokenizer()
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    size |= {"embedding_size": 8, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(shape, **{**size, **changes}))


def test_a_model_needs_no_attention_of_a_certain_kind(tmp_path: Path) -> None:
    """DeBERTa has an attention of its own, which a masked model may have: it takes no mask of this library's."""
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    policy = MaskedPolicy(like("deberta-v2", type_vocab_size=0, **relative), blank_tokenizer())
    policy.save(tmp_path)
    again = ir.load_policy(str(tmp_path))
    texts = again.sample(ROWS, per_prompt=3, max_new_tokens=3)
    assert torch.allclose(policy.score(collate(texts)), collate(texts).old_logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: like("convbert"), "side by side"),
        (lambda: like("mobilebert", true_hidden_size=8, intra_bottleneck_size=8), "without calling its output head"),
        (lambda: like("bert", vocab_size=len(blank_tokenizer()) - 1), "do not belong together"),
    ],
    ids=["company", "head", "vocabulary"],
)
def test_models_that_cannot_be_read_are_refused(model: Any, told: str) -> None:
    """ConvBERT's convolutions read the padding; MobileBERT multiplies by its head's weight without the head."""
    with pytest.raises(UserError, match=told):
        MaskedPolicy(model(), blank_tokenizer())


def test_a_table_of_some_actions_reads_their_places_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of one action each, and not of all actions for each chunk."""
    policy = tiny_masked()
    batch = collate(policy.sample(ROWS, per_prompt=2, max_new_tokens=4, temperature=0.7))
    head = policy.head(policy.model, batch)
    read: list[int] = []
    sharpened = fills.Fills._sharpened

    def counted(self: fills.Fills, states: torch.Tensor) -> torch.Tensor:
        read.append(len(states))
        return sharpened(self, states)

    monkeypatch.setattr(fills.Fills, "_sharpened", counted)
    whole = head.logits(slice(None))
    once = sum(read)
    parts = torch.cat([head.logits(slice(row, row + 1)) for row in range(len(head.hidden))])
    assert torch.allclose(parts, whole, atol=1e-12)
    assert once <= head.states.shape[0] * head.states.shape[1]
    assert read[-len(head.hidden) :] == [head.states.shape[1]] * len(head.hidden)


def test_a_text_counts_once_for_each_of_its_fills_in_a_part() -> None:
    """It is read anew for each, by siblings too: parts that counted it once would not fit in memory."""
    texts = sampled(per_prompt=8)
    read = sum(len(text.token_ids) * len(text.context or []) for text in texts)
    shares = list(collate(texts).shares(40))
    assert sorted(row for share in shares for row in share) == list(range(len(texts)))
    sizes = [sum(len(texts[row].token_ids) * len(texts[row].context or []) for row in share) for share in shares]
    assert sum(sizes) == read > 200
    assert max(sizes) <= 60
