"""The library's own language models: their arithmetic against torch's, dropout, decoding, what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import instant_reward as ir
from instant_reward.batch import collate
from instant_reward.policies.load import with_lora
from instant_reward.policies.recurrence import PARTS, Recurrence, Steps
from instant_reward.sampling.decoder import ModelDecoder, TrunkDecoder, decoder_of
from instant_reward.types import UserError
from tiny import shared_tokenizer, tiny_folder, tiny_own, tiny_policy

torch.set_num_threads(1)
CELLS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU}
OWN = [("recurrent", {"cell": "lstm"}), ("recurrent", {"cell": "gru"}), ("transformer", {})]
every_own = pytest.mark.parametrize(("kind", "shape"), OWN, ids=["lstm", "gru", "transformer"])


def worst(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


@pytest.mark.parametrize("lengths", [[3, 6, 1, 6], [1], [4, 4]], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cells_and_their_gradients_are_torchs(cell: str, lengths: list[int]) -> None:
    """Over rows of different lengths, from any state: values, and the gradients of inputs, weights and states."""
    torch.manual_seed(0)
    theirs = CELLS[cell](5, 7).double()
    # torch's gates of an LSTM are input, forget, candidate, output; ours begin with the output.
    parts = torch.arange(theirs.weight_hh_l0.shape[0]).split(7)
    order = torch.cat([parts[3], parts[0], parts[1], parts[2]]) if cell == "lstm" else torch.cat(parts)
    named = [theirs.weight_ih_l0, theirs.weight_hh_l0, theirs.bias_ih_l0, theirs.bias_hh_l0]
    own = [one.detach()[order].clone().requires_grad_() for one in named]
    steps = Steps.of(torch.tensor(lengths))
    x = torch.randn(len(lengths), max(lengths), 5, dtype=torch.float64)
    inputs = torch.stack([steps.pack(x[:, :, column]) for column in range(5)], 1).requires_grad_()
    start = [torch.randn(len(lengths), 7, dtype=torch.float64, requires_grad=True) for _ in range(PARTS[cell])]
    made = Recurrence.apply(
        cell,
        lambda state: nn.functional.linear(state, own[1], own[3]),
        steps.counts,
        inputs @ own[0].t() + own[2],
        own[1],
        own[3],
        *[one[steps.order] for one in start],
    )
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    data = packed.data.clone().requires_grad_()
    begun = [one.detach().clone().requires_grad_() for one in start]
    behind, last = theirs(
        packed._replace(data=data), tuple(one[None] for one in begun) if cell == "lstm" else begun[0][None]
    )
    assert worst(made[0], behind.data) < 1e-12
    weight = torch.randn_like(behind.data)
    total, wanted = (made[0] * weight).sum(), (behind.data * weight).sum()
    if cell == "lstm":  # a gradient of the cells too
        ends = steps.at(torch.arange(len(lengths)), torch.tensor(lengths) - 1)
        total, wanted = total + made[1][ends].square().sum(), wanted + last[1].square().sum()
    total.backward()
    wanted.backward()
    assert worst(inputs.grad, data.grad) < 1e-12
    for one, other in zip(own, named, strict=True):
        assert worst(one.grad, other.grad[order]) < 1e-12
    for one, other in zip(start, begun, strict=True):
        assert worst(one.grad, other.grad) < 1e-12


@every_own
def test_reading_on_is_reading_at_once(kind: str, shape: dict[str, Any]) -> None:
    """The model's own forward pass, with what it kept of the first tokens."""
    model = tiny_own(kind, **shape)
    ids = torch.arange(60, 78).view(2, 9)
    whole = model(ids).logits
    first = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits
    assert worst(torch.cat([first.logits, rest], 1), whole) < 1e-12
    padded = torch.ones_like(ids)
    padded[0, 6:] = 0
    assert worst(model(ids, attention_mask=padded).logits[0, :6], whole[0, :6]) < 1e-12


def test_padding_on_the_left_is_read_right_or_refused() -> None:
    ids = torch.arange(60, 78).view(2, 9)
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    transformer = tiny_own("transformer")
    found = transformer(ids, attention_mask=padded).logits[0, 3:]
    assert worst(found, transformer(ids[:1, 3:]).logits[0]) < 1e-12
    with pytest.raises(ValueError, match="pad on the right"):
        tiny_own("recurrent")(ids, attention_mask=padded)


@every_own
def test_dropout_is_for_supervised_training_alone(kind: str, shape: dict[str, Any]) -> None:
    """A policy runs without; in training mode its readings differ, and the gradient is that of what was read."""
    policy = tiny_policy(tiny_own(kind, dropout=0.3, **shape))
    batch = collate(policy.sample(["it was", "a"], per_prompt=3, max_new_tokens=6), pad_id=policy.pad_id)
    assert float((policy(batch).logprobs - batch.old_logprobs).abs()[batch.mask].detach().max()) < 1e-6
    policy.model.train()
    readings = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        readings.append(policy(batch).logprobs)
    assert torch.equal(readings[0], readings[1])
    assert worst(readings[0], readings[2]) > 1e-2


@every_own
def test_a_decoder_keeps_its_weights_until_it_loads(kind: str, shape: dict[str, Any]) -> None:
    """With weights of its own (packed, or of bfloat16), sampling goes on as before while the policy learns."""
    policy = tiny_policy(tiny_own(kind, dtype=torch.float32, **shape), torch.bfloat16)
    from instant_reward.sampling.draw import Settings
    from instant_reward.sampling.sampler import in_order

    engine = policy.engine(Settings(max_new_tokens=6))
    prompts = policy.prompts([{"prompt": "it was"}, {"prompt": "the movie"}], "prompt", 6)

    def texts() -> list[list[float]]:
        return [one.logprobs for one in in_order(engine.stream(prompts, 3))]

    before = texts()
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.2)
    assert texts() == before
    engine.load(policy, 1)
    assert texts() != before


@every_own
def test_heads_are_tied_or_free(kind: str, shape: dict[str, Any], tmp_path: Path) -> None:
    for tied in (True, False):
        model = tiny_own(kind, dtype=torch.float32, tie_word_embeddings=tied, **shape)
        folder = tiny_folder(tmp_path / str(tied), model)
        for one in (model, ir.load_policy(str(folder)).model):
            assert (one.get_output_embeddings().weight is one.get_input_embeddings().weight) == tied


def test_first_weights_keep_what_an_lstm_carries() -> None:
    """From a config, and untouched by loading: the forget gate's bias is 1 at first, the others' 0."""
    config = AutoConfig.for_model("recurrent", vocab_size=50, hidden_size=16, cell_size=12)
    layer = AutoModelForCausalLM.from_config(config).trunk.layers[1]
    assert layer.inputs.bias.tolist() == [0.0] * 24 + [1.0] * 12 + [0.0] * 12
    square = layer.carried.weight[:12]
    assert worst(square @ square.t(), torch.eye(12)) < 1e-5


def test_long_texts_have_no_limit_in_a_recurrent_model() -> None:
    """Longer than any position table here: 300 tokens behind a prompt."""
    policy = tiny_policy(tiny_own("recurrent"))
    assert policy.context == 2**31
    rollout = policy.sample(["it was"], max_new_tokens=300, min_new_tokens=300)[0]
    assert sum(rollout.mask) == 300
    batch = collate([rollout], pad_id=policy.pad_id, dtype=torch.float64)
    assert worst(policy(batch).logprobs, batch.old_logprobs) < 1e-10
    with pytest.raises(UserError, match="only 0 fit"):
        tiny_policy(tiny_own("transformer")).sample(["it was"], max_new_tokens=300)


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_products_are_near(cell: str) -> None:
    """The sampler and the trainer make the same products, so that they agree more closely than either with float32."""
    model = tiny_own("recurrent", cell=cell, dtype=torch.float32, initializer_range=0.2)
    half, full = tiny_policy(model, torch.bfloat16), tiny_policy(model, torch.float32)
    batch = collate(half.sample(["it was", "a"], per_prompt=8, max_new_tokens=12), pad_id=half.pad_id)
    found, wanted = half(batch).logprobs, full(batch).logprobs
    assert worst(found, batch.old_logprobs) < 1e-3
    assert 1e-4 < worst(found, wanted) < 0.5
    gradients = [
        torch.cat([one.flatten() for one in torch.autograd.grad(said.sum(), list(model.parameters()))])
        for said in (found, wanted)
    ]
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.99


def test_generate_of_transformers_writes_the_same() -> None:
    """Greedy, two prompts of different lengths, padded on the left as it wants them."""
    model = tiny_own("transformer")
    policy = tiny_policy(model)
    prompts = ["the movie was", "a"]
    ours = policy.sample(prompts, temperature=0.0, max_new_tokens=6, min_new_tokens=6)
    tokenizer = shared_tokenizer()
    tokenizer.padding_side = "left"
    given = tokenizer(prompts, return_tensors="pt", padding=True)
    tokenizer.padding_side = "right"
    theirs = model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
    )
    for row, rollout in zip(theirs, ours, strict=True):
        assert row[-6:].tolist() == rollout.token_ids[-6:]


def test_what_makes_no_model_is_refused() -> None:
    for kind, wrong, said in (
        ("transformer", {"num_attention_heads": 5}, "num_attention_heads=5 does not divide hidden_size=256"),
        ("transformer", {"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ("recurrent", {"dropout": -0.1}, "dropout=-0.1"),
        ("recurrent", {"cell": "rnn"}, "cell='rnn' is unknown; use one of lstm, gru"),
    ):
        with pytest.raises(UserError, match=said):
            AutoConfig.for_model(kind, **wrong)
    with pytest.raises(UserError, match=r"model\.lora: a recurrent model takes no adapter"):
        with_lora(tiny_own("recurrent"))


def test_a_transformer_takes_an_adapter(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", tiny_own("transformer", dtype=torch.float32))
    targets = ["qkv", "out", "up", "down"]
    policy = ir.load_policy(str(folder), lora={"rank": 4, "targets": targets})
    plain = ir.load_policy(str(folder))
    kinds = [type(decoder_of(one.model, torch.float32)) for one in (plain, policy)]
    assert kinds == [TrunkDecoder, ModelDecoder], "only plain layers are computed by the library's own functions"
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    batch = collate(policy.sample(["it was"], per_prompt=3, max_new_tokens=5), pad_id=policy.pad_id)
    assert worst(policy(batch).logprobs, batch.old_logprobs) < 1e-4
    assert worst(policy(batch).logprobs, plain(batch).logprobs) > 1e-2
    policy.save(tmp_path / "merged")
    assert worst(ir.load_policy(str(tmp_path / "merged"))(batch).logprobs, policy(batch).logprobs) < 1e-4
    assert len(shared_tokenizer()) == policy.actions
