"""The library's own layers: the states, gradients and decoded logits of the models they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from instant_reward.batch import collate
from instant_reward.data import to_prompts
from instant_reward.policies import head
from instant_reward.policies import states as states_module
from instant_reward.policies.kernels import Rows
from instant_reward.policies.memory import keep_freed_memory
from instant_reward.policies.optimizer import Optimization
from instant_reward.policies.packed import pack, rows_of
from instant_reward.policies.states import States, trunk
from instant_reward.policies.trunk import Gpt2Shaped, LlamaShaped, Trained, trunk_of
from instant_reward.sampling.decoder import ModelDecoder, TrunkDecoder, decoder_of
from instant_reward.sampling.slots import SlotCache
from instant_reward.sampling.weights import Joined
from tiny import exact, shared_tokenizer, tiny_config, tiny_gpt2, tiny_llama, tiny_policy


def made(kind: Any, config: Any, **changes: Any) -> Any:
    torch.manual_seed(1)
    return kind(config(**tiny_config(**changes))).to(torch.float64)


SHAPES: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mistral": lambda: exact(made(MistralForCausalLM, MistralConfig, sliding_window=None)),
    "qwen2": lambda: exact(made(Qwen2ForCausalLM, Qwen2Config)),
    "qwen3": lambda: exact(made(Qwen3ForCausalLM, Qwen3Config)),
}


def moved(model: Any) -> Any:
    """Norms and biases away from the ones and zeros that they begin with, so that leaving one out would show."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> Any:
    return moved(SHAPES[request.param]())


def gradients(model: Any, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, [one for one in model.parameters() if one.requires_grad], retain_graph=True))


class TestStates:
    def test_they_and_their_gradients_are_the_models_own(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        policy = tiny_policy(model)
        rollouts = policy.sample(["the movie was", "a", " good, but not"], per_prompt=3, max_new_tokens=9)
        batch = collate(rollouts, pad_id=policy.pad_id, dtype=torch.float64)
        base = trunk(policy.model)
        ours = States(torch.float64)
        assert trunk_of(base, ours.products) is not None
        found = ours.of_sampled(base, batch)
        monkeypatch.setattr(states_module, "trunk_of", lambda *_: None)
        expected = States(torch.float64).of_sampled(base, batch)
        assert torch.allclose(found, expected, atol=1e-10)
        upstream = torch.randn_like(found)
        pairs = zip(
            gradients(base, (upstream * found).sum()), gradients(base, (upstream * expected).sum()), strict=True
        )
        assert all(torch.allclose(one, other, atol=1e-9) for one, other in pairs)

    def test_bfloat16_products_are_near_and_follow_every_step(self) -> None:
        half = tiny_policy(tiny_llama(dtype=torch.float32), compute=torch.bfloat16)
        batch = collate(half.sample(["the movie was"], per_prompt=4, max_new_tokens=9), pad_id=half.pad_id)
        before = half(batch).logprobs
        half.prepare(Optimization(learning_rate=0.05))
        half.backward(half(batch).logprobs.sum())
        first = half(batch).logprobs.detach()
        half.step()
        after = half(batch).logprobs.detach()
        assert torch.equal(first, before.detach())
        assert (after - first).abs().max() > 0.01, "the copies of the weights are as they were"
        fresh = tiny_policy(half.model, compute=torch.bfloat16)(batch).logprobs.detach()
        assert torch.equal(after, fresh)


class TestWhatIsKnown:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: made(MistralForCausalLM, MistralConfig, sliding_window=4),
            lambda: made(GemmaForCausalLM, GemmaConfig),
        ],
        ids=["a sliding window", "another shape"],
    )
    def test_other_models_are_left_to_their_own_forward_pass(self, make: Callable[[], Any]) -> None:
        model = make()
        assert trunk_of(trunk(model), Trained(torch.float64)) is None
        assert isinstance(decoder_of(model, torch.float64), ModelDecoder)

    def test_a_model_that_computes_otherwise_is_found_out(self) -> None:
        model = tiny_llama(hidden_act="gelu")
        assert trunk_of(trunk(model), Trained(torch.float64)) is None

    def test_shapes(self) -> None:
        products = Trained(torch.float64)
        assert isinstance(trunk_of(trunk(tiny_llama()), products), LlamaShaped)
        assert isinstance(trunk_of(trunk(tiny_gpt2()), products), Gpt2Shaped)


class TestRows:
    def test_every_token_looks_at_its_prompt_and_at_what_it_follows(self) -> None:
        policy = tiny_policy()
        rollouts = policy.sample(["the movie was", "a"], per_prompt=3, max_new_tokens=7)
        batch = collate(rollouts, pad_id=policy.pad_id)
        packed = pack(batch)
        seen: dict[int, list[int]] = {}
        for rows in packed.rows:
            for row, look in enumerate(rows.look):
                keys = [[int(rows.keys[row, key]) for key in one.nonzero().flatten()] for one in look]
                places = [int(place) - row * look.shape[0] for place in rows.places]
                for place in (one for one in places if 0 <= one < look.shape[0]):
                    token = int(rows.queries[row, place])
                    assert token not in seen
                    seen[token] = keys[place]
        assert sorted(seen) == list(range(len(packed.ids)))
        for token, keys in seen.items():
            positions = [int(packed.positions[key]) for key in keys]
            assert positions == list(range(int(packed.positions[token]) + 1)), "each position once, up to its own"
        at = batch.mask.nonzero()
        for (row, column), state in zip(at.tolist(), packed.states.tolist(), strict=True):
            read = [int(packed.ids[key]) for key in seen[state]]
            assert read == batch.token_ids[row, :column].tolist()

    def test_short_rows_do_not_pay_for_a_long_one(self) -> None:
        spans = [(range(200), range(0)), *((range(200 + 4 * n, 204 + 4 * n), range(0)) for n in range(50))]
        found = rows_of(spans)
        assert sum(one.look.numel() for one in found) < 200 * 200 + 50 * 30 * 30


class TestDecoding:
    @torch.inference_mode()
    def logits(self, decoder: Any, tokens: Tensor) -> Tensor:
        prompts = to_prompts([{"prompt": text} for text in ("the movie", "a")], shared_tokenizer())
        filled, states = decoder.prefill(prompts, 0)
        cache = SlotCache(4, max(len(prompt.token_ids) for prompt in prompts) + len(tokens), len(filled[0]))
        for one in filled:
            cache.add(one, 2)
        found = [decoder.head(states).repeat_interleave(2, 0)]
        found += [decoder.head(decoder.decode(some, cache)) for some in tokens]
        return torch.stack(found)

    @pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
    def test_logits_are_those_of_the_models_own_pass(self, model: Any, dtype: torch.dtype, near: float) -> None:
        model.to(dtype)
        tokens = torch.randint(3, 200, (5, 4))
        found = self.logits(TrunkDecoder(model, dtype), tokens)
        assert torch.allclose(found, self.logits(ModelDecoder(model, dtype), tokens), atol=near, rtol=near)

    def test_decoding_leaves_the_weights_to_the_trainer(self, model: Any) -> None:
        TrunkDecoder(model, torch.float64)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_freed_is_kept_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform
    import sys

    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()


def test_rows_move_together() -> None:
    one = torch.zeros(1, 1, dtype=torch.long)
    rows = Rows(one, one, one.bool()[None], one[0], one[0]).to(torch.device("meta"))
    assert {rows.queries.device.type, rows.look.device.type, rows.tokens.device.type} == {"meta"}


def test_the_slope_of_a_nearly_certain_token_is_not_rounded_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 ``1 - p`` of a p above 0.998 would be 0, while the other words keep their slopes."""
    states = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[8.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    found = []
    for kept in (2**28, 0):  # the probabilities kept, and computed once more
        monkeypatch.setattr(head, "KEPT_BYTES", kept)
        own = weight.clone().requires_grad_(True)
        none = torch.zeros(1, dtype=torch.bool)
        logprobs, _ = head.token_logprobs(
            states.clone().requires_grad_(True), own, None, torch.zeros(1, dtype=torch.long), none, head.Softmax()
        )
        logprobs.sum().backward()
        assert own.grad is not None
        found.append(own.grad)
    right = 1 - float((weight @ torch.tensor([1.0, 0.0])).softmax(0)[0])
    for one in found:
        assert one[0, 0] == pytest.approx(right, rel=1e-2)
        assert abs(float(one[:, 0].sum())) < 1e-2 * right  # the slopes of all words sum to 0


def test_a_long_prompt_and_a_long_text_share_no_product() -> None:
    """Their totals are alike, and together each would pay for the other's."""
    prompts = [(range(1000), range(0)), (range(1000, 1020), range(0))]
    texts = [(range(1020, 1025), range(1000)), (range(1025, 2010), range(1000, 1020))]
    shapes = [tuple(one.look.shape) for one in rows_of([*prompts, *texts])]
    assert sorted(shapes) == [(1, 5, 1005), (1, 20, 20), (1, 985, 1005), (1, 1000, 1000)]


def test_matrices_are_not_packed_where_the_processor_refuses(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not Joined([model.get_output_embeddings()], torch.bfloat16).packs
    assert Joined([model.get_output_embeddings()], torch.float32).packs
