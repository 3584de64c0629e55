"""A causal model as a policy: log-probabilities and gradients, adapters, precision, saving, optimizer steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from instant_reward.batch import Batch, collate
from instant_reward.data import to_prompts
from instant_reward.policies import head, layout, states
from instant_reward.policies.causal import CausalPolicy
from instant_reward.policies.head import Softmax, token_logprobs
from instant_reward.policies.kinds import load_policy
from instant_reward.policies.optimizer import Group, Optimization, Stepper
from instant_reward.sampling.decoder import ModelDecoder
from instant_reward.sampling.draw import Settings
from instant_reward.sampling.engine import Engine
from instant_reward.types import Needs, RunError, UserError
from tiny import (
    CONTEXT,
    END,
    exact,
    shared_tokenizer,
    tiny_config,
    tiny_folder,
    tiny_gpt2,
    tiny_llama,
    tiny_policy,
    tiny_tokenizer,
)

ROWS, LENGTH = 3, 9
EXACT = {"rtol": 0.0, "atol": 1e-10}


def tied_llama() -> Any:
    torch.manual_seed(4)
    return exact(LlamaForCausalLM(LlamaConfig(**tiny_config(tie_word_embeddings=True))).double())


def phi() -> Any:
    """A model whose output head has a bias."""
    torch.manual_seed(4)
    fields = {key: value for key, value in tiny_config().items() if key not in ("num_key_value_heads", "head_dim")}
    model = PhiForCausalLM(PhiConfig(**fields)).double()
    torch.nn.init.normal_(model.lm_head.bias)
    return model


MODELS: dict[str, Callable[[], Any]] = {"llama": tiny_llama, "tied": tied_llama, "gpt2": tiny_gpt2, "phi": phi}


@pytest.fixture(params=MODELS)
def policy(request: pytest.FixtureRequest) -> CausalPolicy:
    return tiny_policy(MODELS[request.param]())


@pytest.fixture(params=["kept", "computed again"])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows of logits at a time, kept for the backward pass or not."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 5 * len(shared_tokenizer()) + 1)
    monkeypatch.setattr(head, "CACHED_ELEMENTS", 3 * len(shared_tokenizer()) + 1)
    monkeypatch.setattr(head, "KEPT_BYTES", 10**9 if request.param == "kept" else 0)


def random_ids(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(7))


def random_mask(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(8)) < 0.6
    mask[:, 0] = False
    return mask


def weights_of(shape: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def by_definition(model: Any, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """``log_softmax`` of the whole ``[B, L, V]`` of logits, gathered: 0 where the mask is off."""
    logprobs = (model(ids).logits / temperature).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    return torch.where(mask, torch.cat([torch.zeros_like(logprobs[:, :1]), logprobs], 1), 0.0)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = float(gradient.abs().max())
        assert size > 0 or "k_proj.bias" in name, name  # a bias of the keys moves all scores alike
        assert float((found[name] - gradient).abs().max()) <= 1e-11 * size + 1e-12, name


def siblings(policy: CausalPolicy, per_prompt: int = 4, **settings: Any) -> Batch:
    rollouts = policy.sample(
        ["the movie was", "a", " good, but not of the"], per_prompt=per_prompt, max_new_tokens=12, **settings
    )
    return collate(rollouts, dtype=torch.float64)


class TestLogProbabilities:
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    @pytest.mark.usefixtures("small_chunks")
    def test_they_and_their_gradients_are_those_of_the_softmax(self, policy: CausalPolicy, temperature: float) -> None:
        ids, mask = random_ids(), random_mask()
        ours = policy.logprobs(ids, mask, temperature=temperature)
        theirs = by_definition(policy.model, ids, mask, temperature)
        assert ours.dtype == torch.float64
        assert torch.allclose(ours, theirs, **EXACT)
        upstream = weights_of(ours.shape)
        found = gradients(policy.model, (upstream * ours).sum())
        expected = gradients(policy.model, (upstream * theirs).sum())
        assert found.keys() == dict(policy.model.named_parameters()).keys()
        assert_same_gradients(found, expected)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
    def test_the_mask_may_have_any_dtype(self, dtype: torch.dtype) -> None:
        policy, ids, mask = tiny_policy(), random_ids(), random_mask()
        assert torch.equal(policy.logprobs(ids, mask.to(dtype)), policy.logprobs(ids, mask))

    def test_lists_do_as_well(self) -> None:
        policy, ids, mask = tiny_policy(), random_ids(), random_mask()
        assert torch.equal(policy.logprobs(ids.tolist(), mask.int().tolist(), [9, 9, 9]), policy.logprobs(ids, mask))

    def test_padding_changes_nothing_and_the_length_may_be_left_out(self) -> None:
        policy, ids, mask = tiny_policy(), random_ids(), random_mask()
        mask[1, 6:] = False
        lengths = torch.tensor([LENGTH, 6, LENGTH])
        other = ids.clone()
        other[1, 6:] = 11
        expected = policy.logprobs(ids, mask, lengths)
        assert torch.equal(policy.logprobs(ids, mask), expected)
        assert torch.allclose(policy.logprobs(other, mask), expected, **EXACT)
        wider = torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(mask, (0, 4))
        assert torch.allclose(policy.logprobs(*wider)[:, :LENGTH], expected, **EXACT)

    def test_where_nothing_was_sampled_they_are_0(self) -> None:
        policy, ids = tiny_policy(), random_ids()
        none = policy.logprobs(ids, torch.zeros_like(ids))
        assert torch.equal(none, torch.zeros(ROWS, LENGTH, dtype=torch.float64))
        some = random_mask()
        some[1] = False
        assert torch.equal(policy.logprobs(ids, some)[1], torch.zeros(LENGTH, dtype=torch.float64))

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"mask": torch.ones(ROWS, LENGTH)}, "the mask is on at a row's first token, which nothing precedes"),
            ({"mask": random_mask()[:, :5]}, r"token_ids \(3, 9\) and mask \(3, 5\) must both be \[B, L\]"),
            ({"token_ids": random_ids()[0], "mask": random_mask()[0]}, r"must both be \[B, L\]"),
            ({"length": [2, 2, 2]}, "the mask is on beyond a row's length"),
            ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
            ({"temperature": math.nan}, "temperature=nan must be above 0"),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_what_is_refused(self, change: dict[str, Any], complaint: str) -> None:
        arguments = {"token_ids": random_ids(), "mask": random_mask(), **change}
        with pytest.raises(UserError, match=f"logprobs: .*{complaint}"):
            tiny_policy().logprobs(**arguments)

    def test_the_entropy_is_that_of_the_distribution(self, policy: CausalPolicy) -> None:
        batch = siblings(policy, temperature=0.7)
        output = policy(batch)
        whole = (policy.model(batch.token_ids).logits / 0.7).log_softmax(-1)
        expected = -(whole.exp() * whole).sum(-1)[:, :-1]
        assert output.entropy is not None
        assert not output.entropy.requires_grad
        assert torch.allclose(output.entropy[:, 1:], torch.where(batch.mask[:, 1:], expected, 0.0), **EXACT)

    def test_forbidden_end_tokens_are_left_out_as_the_sampler_left_them_out(self, policy: CausalPolicy) -> None:
        batch = siblings(policy, min_new_tokens=5)
        assert bool(batch.no_end.any())
        logits = policy.model(batch.token_ids).logits[:, :-1]
        ends = torch.zeros(logits.shape[-1], dtype=torch.bool)
        ends[list(policy.end_ids)] = True
        logits = logits.masked_fill(batch.no_end[:, 1:, None] & ends, -torch.inf)
        expected = logits.log_softmax(-1).gather(2, batch.token_ids[:, 1:, None]).squeeze(2)
        expected = torch.where(batch.mask[:, 1:], expected, 0.0)
        ours = policy(batch).logprobs
        assert torch.allclose(ours[:, 1:], expected, **EXACT)
        assert torch.allclose(ours, batch.old_logprobs, **EXACT)
        upstream = weights_of(ours.shape)
        found = gradients(policy.model, (upstream * ours).sum())
        assert_same_gradients(found, gradients(policy.model, (upstream[:, 1:] * expected).sum()))


class TestHead:
    """The backward pass written by hand against autograd."""

    @pytest.mark.parametrize("kept", [0, 10**9], ids=["again", "kept"])
    @pytest.mark.parametrize("rows_at_once", [1, 4, 1000])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(
        "softmax",
        [Softmax(), Softmax(0.6), Softmax(1.0, (3,)), Softmax(1.7, (3, 11))],
        ids=["plain", "temperature", "forbidden", "both"],
    )
    def test_values_and_gradients(
        self, softmax: Softmax, bias: bool, rows_at_once: int, kept: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        count, width, words = 9, 6, 20
        monkeypatch.setattr(head, "KEPT_BYTES", kept)
        monkeypatch.setattr(head, "CACHED_ELEMENTS", max(1, rows_at_once - 1) * words)
        monkeypatch.setattr(head, "CHUNK_ELEMENTS", rows_at_once * words)
        generator = torch.Generator().manual_seed(2)
        hidden, weight, shift = (
            torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
            for shape in ((count, width), (words, width), (words,))
        )
        leaves = [hidden, weight, *([shift] if bias else [])]
        targets = torch.randint(12, words, (count,), generator=generator)
        no_end = torch.arange(count) % 2 == 0
        ours, entropy = token_logprobs(hidden, weight, shift if bias else None, targets, no_end, softmax)
        logits = torch.nn.functional.linear(hidden, weight, shift if bias else None) / softmax.temperature
        closed = torch.zeros(words, dtype=torch.bool)
        closed[list(softmax.end_ids)] = True
        logprobs = logits.masked_fill(no_end[:, None] & closed, -torch.inf).log_softmax(-1)
        theirs = logprobs.gather(1, targets[:, None]).squeeze(1)
        assert torch.allclose(ours, theirs, **EXACT)
        mean = (logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)
        assert torch.allclose(entropy, -mean, **EXACT)
        upstream = weights_of(count)
        found = torch.autograd.grad((upstream * ours).sum(), leaves, retain_graph=True)
        again = torch.autograd.grad((upstream * ours).sum(), leaves)
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
        expected = torch.autograd.grad((upstream * theirs).sum(), leaves)
        for mine, autograd in zip(found, expected, strict=True):
            assert torch.allclose(mine, autograd, **EXACT)

    def test_without_gradient_nothing_is_kept(self) -> None:
        hidden, weight = torch.randn(4, 6), torch.randn(20, 6)
        values, _ = token_logprobs(hidden, weight, None, torch.arange(4), torch.zeros(4, dtype=torch.bool), Softmax())
        assert values.grad_fn is None

    def test_a_frozen_head_gets_no_gradient(self) -> None:
        hidden = torch.randn(4, 6, requires_grad=True)
        weight = torch.randn(20, 6)
        values, _ = token_logprobs(hidden, weight, None, torch.arange(4), torch.zeros(4, dtype=torch.bool), Softmax())
        values.sum().backward()
        assert hidden.grad is not None
        assert weight.grad is None

    def test_large_logits_do_not_overflow(self) -> None:
        hidden = torch.tensor([[1e4]], requires_grad=True)
        weight = torch.tensor([[1.0], [-1.0], [0.999]])
        none = torch.zeros(1, dtype=torch.bool)
        value, entropy = token_logprobs(hidden, weight, None, torch.tensor([0]), none, Softmax())
        value.sum().backward()
        assert torch.isfinite(torch.cat([value.detach(), entropy, hidden.grad.flatten()])).all()  # type: ignore[union-attr]


class TestLayouts:
    def assert_shared_equals_plain(self, policy: CausalPolicy, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
        """Packed tokens, and the model's own pass over siblings behind one prompt, equal its pass over a row each."""
        assert layout.lay_out(batch).attention_mask is not None, "these rows should share their prompt"
        packed = policy(batch)
        with monkeypatch.context() as patch:
            patch.setattr(states, "trunk_of", lambda *_: None)
            policy.states = states.States(policy.compute)
            shared = policy(batch)
            patch.setattr(states, "lay_out", layout._plain)
            plain = policy(batch)
        policy.states = states.States(policy.compute)
        upstream = weights_of(plain.logprobs.shape)
        expected = gradients(policy.model, (upstream * plain.logprobs).sum())
        for output in (packed, shared):
            assert torch.allclose(output.logprobs, plain.logprobs, **EXACT)
            assert torch.allclose(output.entropy, plain.entropy, **EXACT)  # type: ignore[arg-type]
            found = gradients(policy.model, (upstream * output.logprobs).sum())
            assert_same_gradients(found, expected)

    def test_siblings_behind_one_prompt_equal_a_row_each(
        self, policy: CausalPolicy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.assert_shared_equals_plain(policy, siblings(policy), monkeypatch)

    def test_texts_of_one_token_and_groups_of_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        policy = tiny_policy()
        long = "the movie was good bad fine slow long and but not a of it!"
        rollouts = policy.sample([long, "a"], per_prompt=3, max_new_tokens=4)
        rollouts += policy.sample([long], per_prompt=2, max_new_tokens=1)
        for number, rollout in enumerate(rollouts):
            rollout.group = [0, 0, 0, 0, 1, 1, 2, 2][number]  # one group has two prompts
        chosen = collate([rollouts[number] for number in (6, 0, 3, 1, 7, 2)], dtype=torch.float64)
        self.assert_shared_equals_plain(policy, chosen, monkeypatch)

    def test_masks_with_gaps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tokens that others wrote lie between the sampled ones."""
        policy = tiny_policy()
        batch = siblings(policy, min_new_tokens=12)
        batch.mask[:, -4:-2] = False
        batch.no_end &= batch.mask
        self.assert_shared_equals_plain(policy, batch, monkeypatch)

    def test_parts_of_a_batch_equal_the_whole(self) -> None:
        policy = tiny_policy()
        batch = siblings(policy)
        whole = policy(batch).logprobs
        for tokens in (10, 60, 200):
            found = torch.cat([policy(part).logprobs[part.mask] for part in batch.parts(tokens)])
            assert torch.allclose(found.sort().values, whole[batch.mask].sort().values, **EXACT)

    def test_rows_that_share_nothing_are_laid_out_plainly(self) -> None:
        batch = siblings(tiny_policy(), per_prompt=1)
        assert layout.lay_out(batch).attention_mask is None

    def test_too_many_tokens_side_by_side_are_laid_out_plainly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        batch = siblings(tiny_policy())
        monkeypatch.setattr(layout, "SHARED_LIMIT", 20)
        assert layout.lay_out(batch).attention_mask is None


def take_steps(policy: CausalPolicy, count: int, first: int = 0) -> list[dict[str, float]]:
    """Optimizer steps from gradients that depend on nothing but the weights and the step."""
    found = []
    for step in range(first, first + count):
        ids = torch.randint(0, 300, (2, 8), generator=torch.Generator().manual_seed(step))
        mask = torch.ones_like(ids)
        mask[:, 0] = 0
        policy.backward(-policy.logprobs(ids, mask).sum())
        found.append(policy.step())
    return found


def weights(policy: CausalPolicy) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}


class TestReference:
    def test_it_stays_as_the_policy_was_when_it_was_prepared(self, policy: CausalPolicy) -> None:
        batch = siblings(policy)
        before = policy(batch).logprobs.detach()
        policy.prepare(Optimization(learning_rate=1e-2), Needs(reference=True))
        take_steps(policy, 2)
        assert (policy(batch).logprobs - before).abs().max() > 1e-3
        for tokens in (16, 100, 4096):
            reference = policy.annotate(batch, tokens_per_part=tokens).ref_logprobs
            assert reference is not None
            assert torch.allclose(reference, before, **EXACT)
            assert not reference.requires_grad

    def test_the_policys_own_are_scored_in_parts_too(self, policy: CausalPolicy) -> None:
        batch = siblings(policy)
        for tokens in (16, 100, 4096):
            found = policy.score(batch, tokens_per_part=tokens)
            assert not found.requires_grad
            assert torch.allclose(found, batch.old_logprobs, **EXACT)

    def test_without_one_nothing_is_added(self) -> None:
        policy = tiny_policy()
        policy.prepare(Optimization())
        batch = siblings(policy)
        assert policy.annotate(batch) is batch


@pytest.fixture(params=["llama", "gpt2"])
def adapted(request: pytest.FixtureRequest, tmp_path: Path) -> CausalPolicy:
    """A policy with an adapter that has been trained a little."""
    folder = tiny_folder(tmp_path / "base", MODELS[request.param]())
    policy = load_policy(str(folder), "float64", lora={"rank": 4, "alpha": 8.0})
    exact(policy.model)
    policy.prepare(Optimization(learning_rate=1e-2, steps=9, schedule="linear"), Needs(reference=True))
    take_steps(policy, 3)
    return policy


class TestAdapters:
    def test_the_reference_is_the_model_with_the_adapter_switched_off(
        self, adapted: CausalPolicy, tmp_path: Path
    ) -> None:
        batch = siblings(adapted)
        base = load_policy(str(tmp_path / "base"), "float64")
        exact(base.model)
        expected = base(batch).logprobs.detach()
        reference = adapted.annotate(batch).ref_logprobs
        assert adapted.reference is None, "the base is there already: no copy of it"
        assert reference is not None
        assert torch.allclose(reference, expected, **EXACT)
        assert (adapted(batch).logprobs - expected).abs().max() > 1e-3

    def test_only_the_adapter_is_trained(self, adapted: CausalPolicy) -> None:
        before = weights(adapted)
        take_steps(adapted, 2, first=3)
        moved = {name for name, weight in weights(adapted).items() if not torch.equal(weight, before[name])}
        assert moved == {name for name in before if "lora_" in name}
        assert moved

    def test_the_sampler_draws_from_the_adapted_model(self, adapted: CausalPolicy) -> None:
        batch = siblings(adapted)
        assert torch.allclose(adapted(batch).logprobs, batch.old_logprobs, **EXACT)

    def test_what_is_saved_has_the_adapter_merged_in(self, adapted: CausalPolicy, tmp_path: Path) -> None:
        ids, mask = random_ids(), random_mask()
        before = weights(adapted)
        folder = adapted.save(tmp_path / "merged")
        model = exact(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
        assert not any("lora" in name for name, _ in model.named_parameters())
        assert torch.allclose(by_definition(model, ids, mask), adapted.logprobs(ids, mask), **EXACT)
        after = weights(adapted)
        assert all(torch.equal(after[name], before[name]) for name in before)
        take_steps(adapted, 1, first=3)

    def test_a_state_is_restored_bit_for_bit(self, adapted: CausalPolicy, tmp_path: Path) -> None:
        (tmp_path / "state").mkdir()
        adapted.save_state(tmp_path / "state")
        assert not (tmp_path / "state" / "policy").exists()
        expected = take_steps(adapted, 2, first=3)
        other = load_policy(str(tmp_path / "base"), "float64", lora={"rank": 4, "alpha": 8.0})
        exact(other.model)
        other.prepare(Optimization(learning_rate=1e-2, steps=9, schedule="linear"), Needs(reference=True))
        other.load_state(tmp_path / "state")
        assert take_steps(other, 2, first=3) == expected
        found, wanted = weights(other), weights(adapted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    def test_dropout_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"model\.lora\.dropout must be 0"):
            load_policy(str(tiny_folder(tmp_path / "base")), lora={"rank": 2, "dropout": 0.1})

    @pytest.mark.parametrize("targets", ["lm_head", ["q_proj", "lm_head"]])
    def test_an_adapter_on_the_output_head_is_refused(self, tmp_path: Path, targets: Any) -> None:
        """Log-probabilities are computed from the head's own weight: the adapter would act on the samples alone."""
        folder = str(tiny_folder(tmp_path / "base"))
        with pytest.raises(UserError, match=r"model\.lora\.targets: an adapter on the output head"):
            load_policy(folder, lora={"rank": 2, "targets": targets})
        policy = load_policy(folder, lora={"rank": 2, "targets": ["q_proj"]})
        ids, mask = random_ids(), random_mask()
        assert torch.allclose(policy.logprobs(ids, mask), by_definition(policy.model, ids, mask), atol=1e-5)


def what_it_says(engine: Engine) -> Tensor:
    """The logits behind a few tokens."""
    prompts = to_prompts([{"prompt": "the movie was"}], shared_tokenizer())
    return engine.prefill(prompts)[1].clone()


class TestPrecision:
    @pytest.fixture
    def half(self, tmp_path: Path) -> CausalPolicy:
        return load_policy(str(tiny_folder(tmp_path / "base")), "bfloat16")

    def test_bfloat16_computes_on_float32_weights(self, half: CausalPolicy, tmp_path: Path) -> None:
        full = load_policy(str(tmp_path / "base"), "float32")
        assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
        ids, mask = random_ids(), random_mask()
        rough, fine = half.logprobs(ids, mask), full.logprobs(ids, mask)
        assert rough.dtype == fine.dtype == torch.float32
        assert 1e-5 < float((rough - fine).detach().abs().max()) < 0.2
        found, expected = gradients(half.model, rough.sum()), gradients(full.model, fine.sum())
        for name, gradient in expected.items():
            assert found[name].dtype == torch.float32
            assert (found[name] - gradient).norm() < 0.1 * gradient.norm(), name

    def test_steps_smaller_than_bfloat16_shows_are_kept(self, half: CausalPolicy) -> None:
        half.prepare(Optimization(learning_rate=1e-6))
        before = weights(half)
        take_steps(half, 1)
        moved = [weight != before[name] for name, weight in weights(half).items()]
        assert sum(int(one.sum()) for one in moved) > 0.5 * sum(one.numel() for one in moved)

    def test_the_samplers_copy_follows_load(self, half: CausalPolicy) -> None:
        engine = Engine(half, Settings())
        before = what_it_says(engine)
        with torch.no_grad():
            for parameter in half.model.parameters():
                parameter.mul_(1.5)
        stale = what_it_says(engine)
        assert torch.equal(stale, before)  # until it is told, it decodes with what it had
        engine.load(half, version=1)
        assert torch.equal(what_it_says(engine), what_it_says(Engine(half, Settings())))
        assert not torch.allclose(what_it_says(engine), before, atol=0.1)

    def test_a_model_of_an_unknown_shape_is_decoded_by_its_own_pass_over_a_copy(self, half: CausalPolicy) -> None:
        decoder = ModelDecoder(half.model, torch.bfloat16)
        copies, masters = dict(decoder.model.named_parameters()), dict(half.model.named_parameters())
        with torch.no_grad():
            for parameter in half.model.parameters():
                parameter.mul_(1.5)
        assert not any(torch.equal(copies[name], master.bfloat16()) for name, master in masters.items())
        decoder.load(half.model)
        for name, master in masters.items():
            assert copies[name].dtype == torch.bfloat16
            assert torch.equal(copies[name], master.bfloat16()), name
        buffers = dict(half.model.named_buffers())
        assert "model.rotary_emb.inv_freq" in buffers
        for name, copied in decoder.model.named_buffers():  # rotary frequencies stay exact
            assert torch.equal(copied, buffers[name]), name

    def test_tied_weights_stay_tied_in_that_copy(self, tmp_path: Path) -> None:
        half = load_policy(str(tiny_folder(tmp_path / "tied", tied_llama().float())), "bfloat16")
        model = ModelDecoder(half.model, torch.bfloat16).model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def test_the_samplers_log_probabilities_are_close_to_the_trainers(self, half: CausalPolicy) -> None:
        batch = collate(half.sample(["the movie was", "a"], per_prompt=4, max_new_tokens=24))
        gap = (half(batch).logprobs.detach() - batch.old_logprobs)[batch.mask].abs()
        assert float(gap.mean()) < 0.05
        assert float(gap.max()) < 0.5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_without_bfloat16_too_it_decodes_with_what_was_loaded(self, dtype: torch.dtype) -> None:
        policy = CausalPolicy(tiny_llama(dtype=dtype), shared_tokenizer(), dtype)
        engine = Engine(policy, Settings())
        before = what_it_says(engine)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.5)
        assert torch.equal(what_it_says(engine), before)
        engine.load(policy, version=1)
        assert torch.equal(what_it_says(engine), what_it_says(Engine(policy, Settings())))

    def test_an_unknown_dtype_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="dtype='float16' is unknown; use one of auto, float32, bfloat16, float64"):
            load_policy(str(tiny_folder(tmp_path)), "float16")  # type: ignore[arg-type]


class TestSaving:
    def test_what_is_saved_loads_with_transformers_and_is_the_same(self, policy: CausalPolicy, tmp_path: Path) -> None:
        ids, mask = random_ids(), random_mask()
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.add_(0.01)
        folder = policy.save(tmp_path / "new" / "folder")
        expected = policy.logprobs(ids, mask)
        model = exact(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
        assert torch.allclose(by_definition(model, ids, mask), expected, **EXACT)
        loaded = load_policy(str(folder), "float64")
        exact(loaded.model)
        kept, own = loaded.model.state_dict(), policy.model.state_dict()
        assert kept.keys() == own.keys()
        assert all(torch.equal(kept[name], own[name]) for name in own)
        # How products are rounded hangs on where the weights lie in memory.
        assert torch.allclose(loaded.logprobs(ids, mask), expected, **EXACT)

    def test_the_tokenizer_comes_along(self, tmp_path: Path) -> None:
        folder = tiny_policy().save(tmp_path)
        found, own = AutoTokenizer.from_pretrained(folder), shared_tokenizer()
        text = f" good movie, 你好{END}"
        assert found(text)["input_ids"] == own(text)["input_ids"]
        assert (found.eos_token_id, found.pad_token_id) == (own.eos_token_id, own.pad_token_id)
        assert found.chat_template == own.chat_template

    @pytest.mark.parametrize("schedule", ["constant", "cosine"])
    def test_a_state_is_restored_bit_for_bit(self, policy: CausalPolicy, tmp_path: Path, schedule: Any) -> None:
        settings = Optimization(learning_rate=1e-2, steps=6, schedule=schedule, warmup=1, weight_decay=0.1)
        other = tiny_policy(copy.deepcopy(policy.model))
        policy.prepare(settings)
        take_steps(policy, 3)
        policy.save_state(tmp_path)
        expected = take_steps(policy, 3, first=3)
        other.prepare(settings)
        other.load_state(tmp_path)
        assert take_steps(other, 3, first=3) == expected
        found, wanted = weights(other), weights(policy)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        mine, theirs = (one.stepper.state_dict()["optimizer"]["state"] for one in (other, policy))  # type: ignore[union-attr]
        assert mine.keys() == theirs.keys()
        for key, state in theirs.items():
            assert all(torch.equal(mine[key][name], value) for name, value in state.items())


class TestLoading:
    def test_a_folder_is_loaded_with_its_tokenizer(self, tmp_path: Path) -> None:
        policy = load_policy(str(tiny_folder(tmp_path)))
        assert (policy.compute, policy.context) == (torch.float32, CONTEXT)
        assert policy.end_ids == (shared_tokenizer().eos_token_id,)
        assert len(policy.sample(["the movie"], per_prompt=2, max_new_tokens=3)) == 2

    def test_dropout_of_the_models_own_is_switched_off(self) -> None:
        model = tiny_llama(attention_dropout=0.5).train()
        ids, mask = random_ids(), random_mask()
        policy = tiny_policy(model)
        assert torch.equal(policy.logprobs(ids, mask), policy.logprobs(ids, mask))

    @pytest.mark.parametrize("broken", ["weights", "no weights", "config", "no tokenizer"])
    def test_a_broken_folder_is_an_error_of_one_sentence(self, tmp_path: Path, broken: str) -> None:
        folder = tiny_folder(tmp_path / "model")
        stored = folder / "model.safetensors"
        if broken == "weights":
            stored.write_bytes(stored.read_bytes()[:5000])
        elif broken == "no weights":
            stored.unlink()
        elif broken == "config":
            (folder / "config.json").write_text("{")
        else:
            for path in folder.glob("*token*"):
                path.unlink()
        with pytest.raises(UserError, match="model") as caught:
            load_policy(str(folder))
        assert "\n" not in str(caught.value)

    def test_a_tokenizer_without_a_pad_token_is_fine(self, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer(pad=False)
        assert tokenizer.pad_token_id is None
        policy = load_policy(str(tiny_folder(tmp_path, tiny_gpt2(), tokenizer)), "float64")
        rollouts = policy.sample(["the movie was", "a"], per_prompt=2, max_new_tokens=8)
        batch = collate(rollouts, pad_id=policy.pad_id, dtype=torch.float64)
        assert torch.allclose(policy(batch).logprobs, batch.old_logprobs, **EXACT)

    def test_all_end_tokens_are_known(self) -> None:
        model = tiny_llama()
        model.generation_config.eos_token_id = [7, 9]
        end = shared_tokenizer().eos_token_id
        assert tiny_policy(model).end_ids == (7, 9, end)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: GraniteForCausalLM(GraniteConfig(**tiny_config(logits_scaling=8.0))),
            lambda: Gemma2ForCausalLM(Gemma2Config(**tiny_config())),
            lambda: Gemma2ForCausalLM(Gemma2Config(**tiny_config(initializer_range=0.001))),
        ],
        ids=["scaled", "capped", "capped and young"],
    )
    def test_a_model_that_changes_its_logits_after_the_head_is_refused(self, make: Callable[[], Any]) -> None:
        with pytest.raises(UserError, match=r"changes its logits after the output head .* use another model"):
            tiny_policy(make().double())

    def test_a_wrapped_head_is_refused(self) -> None:
        model = tiny_llama()
        plain = model.forward
        model.forward = lambda *arguments, **options: Doubled(plain(*arguments, **options))
        with pytest.raises(UserError, match="changes its logits"):
            tiny_policy(model)

    def test_a_vocabulary_that_does_not_match_is_refused(self) -> None:
        with pytest.raises(UserError, match="do not belong together"):
            tiny_policy(tiny_llama(vocab_size=len(shared_tokenizer()) - 1, pad_token_id=None))

    def test_attention_that_takes_no_mask_of_ours_is_refused(self) -> None:
        with pytest.raises(UserError, match="runs the attention 'eager', and only 'sdpa' is supported"):
            tiny_policy(tiny_llama(attn_implementation="eager"))


class Doubled:
    """A model's output with other logits."""

    def __init__(self, output: Any) -> None:
        self.logits = output.logits * 2


class TestSteps:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_gradient_that_is_not_finite_is_an_error_and_harms_nothing(self, bad: float) -> None:
        policy = tiny_policy()
        policy.prepare(Optimization(learning_rate=1e-2))
        take_steps(policy, 1)
        assert policy.stepper is not None
        before, state = weights(policy), copy.deepcopy(policy.stepper.state_dict())
        ids, mask = random_ids(), random_mask()
        policy.backward(policy.logprobs(ids, mask).sum() * bad)
        with pytest.raises(
            RunError, match=r"gradient of optimizer step 2 is not finite.*lower train\.learning_rate"
        ) as e:
            policy.step()
        assert "rewards" in str(e.value)
        assert all(torch.equal(weight, before[name]) for name, weight in weights(policy).items())
        assert all(parameter.grad is None for parameter in policy.model.parameters())
        after = policy.stepper.state_dict()
        assert after["done"] == state["done"] == 1
        for key, values in state["optimizer"]["state"].items():
            for name, value in values.items():
                assert torch.equal(after["optimizer"]["state"][key][name], value)

    def test_the_gradient_is_bounded_and_its_norm_before_that_is_told(self) -> None:
        """Against torch's own AdamW on gradients cut by hand."""
        generator = torch.Generator().manual_seed(0)
        mine = [
            torch.randn(4, 3, generator=generator).requires_grad_(),
            torch.randn(5, generator=generator).requires_grad_(),
        ]
        theirs = [one.detach().clone().requires_grad_() for one in mine]
        stepper = Stepper([Group(mine, 0.1)], Optimization(learning_rate=0.1, weight_decay=0.01, max_grad_norm=0.5))
        optimizer = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.01)
        for size in (0.01, 3.0, 0.2):
            for one, other in zip(mine, theirs, strict=True):
                one.grad = torch.randn(one.shape, generator=generator) * size
                other.grad = one.grad.clone()
            norm = math.sqrt(sum(float((other.grad**2).sum()) for other in theirs if other.grad is not None))
            for other in theirs:
                assert other.grad is not None
                other.grad *= min(1.0, 0.5 / norm)
            optimizer.step()
            assert stepper.step() == [pytest.approx(norm, rel=1e-5)]
            for one, other in zip(mine, theirs, strict=True):
                assert torch.allclose(one, other, atol=1e-5)
                assert one.grad is None

    @pytest.mark.parametrize(
        ("schedule", "rates"),
        [
            ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
            ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
            ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
        ],
    )
    def test_the_learning_rate_follows_its_schedule(self, schedule: Any, rates: list[float]) -> None:
        policy = tiny_policy()
        policy.prepare(Optimization(learning_rate=1.0, steps=6, schedule=schedule, warmup=2))
        assert policy.stepper is not None
        for step, rate in enumerate(rates):
            (taken,) = take_steps(policy, 1, first=step)
            assert taken["learning_rate"] == pytest.approx(rate)
            assert policy.stepper.optimizer.param_groups[0]["lr"] == taken["learning_rate"]

    def test_gradients_of_several_parts_add_up(self) -> None:
        one, other = tiny_policy(), tiny_policy()
        ids, mask = random_ids(), random_mask()
        for policy in (one, other):
            policy.prepare(Optimization(learning_rate=1e-2))
        one.backward(one.logprobs(ids, mask).sum())
        for row in range(ROWS):
            other.backward(other.logprobs(ids[row : row + 1], mask[row : row + 1]).sum())
        assert one.step()["grad_norm"] == pytest.approx(other.step()["grad_norm"], rel=1e-12)
        found, expected = weights(other), weights(one)
        assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-8) for name in expected)
