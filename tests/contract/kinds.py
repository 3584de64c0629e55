"""The kinds of policies that keep the contract: one entry each, and what the tests ask of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import choosing
import instant_reward as ir
from deciding import tiny_classifier
from instant_reward.policies.causal import CausalPolicy
from instant_reward.policies.extractive import ExtractivePolicy
from instant_reward.policies.masked import MaskedPolicy
from instant_reward.policies.policy import Policy
from instant_reward.rewards.base import as_rewards
from instant_reward.rewards.watch import Watch
from instant_reward.types import Prompt, Rollout
from tiny import exact, tiny_gpt2, tiny_llama, tiny_own, tiny_policy
from tiny_seq2seq import tiny_seq2seq

LETTERS = ("a", "b", "<end>")


@ir.reward(every="token")
def writes_o(view: ir.View) -> float:
    """One for each token that brings the letter: what the small task asks for."""
    return 1.0 if "o" in view.piece else 0.0


@ir.reward(every="end")
def right(view: ir.View) -> float:
    """Whether the label is the row's."""
    return float(view.text == view.info["label"])


@ir.reward(every="end")
def second_first(view: ir.View) -> float:
    """Whether a summary begins with the document's second sentence."""
    return float(view.text.startswith(("Two", "D e", "C d")))


@ir.reward(every="end")
def begins_with_c(view: ir.View) -> float:
    """Whether the text begins with this word."""
    return float(view.text.startswith("c"))


@dataclass(frozen=True)
class Kind:
    """A kind of policy.

    Attributes:
        policy: a small one, whose texts differ in length; with float64 every operation is float64.
        few: one in float64 with so few actions that all its texts are enumerated, and a prompt for it.
        chances: the probabilities of texts ``[N]`` with gradient, by the model alone: nothing of the policy is used.
        longest: how many actions a text of ``few`` has at most; 1 where every text has one.
        rows: prompts of different lengths.
        sample: further options of ``Policy.sample``, with which texts end at different times.
        sections: of the config of a training run on ``rows``, without model, steps and folder.
        reward: of the small task; level: what its mean must pass; steps: in how many steps.
    """

    name: str
    policy: Callable[[torch.dtype], Policy]
    few: Callable[[], tuple[Policy, Prompt]]
    chances: Callable[[Policy, Sequence[Rollout]], Tensor]
    longest: int = 3
    rows: tuple[dict[str, Any], ...] = ({"prompt": "the movie was"}, {"prompt": "a"}, {"prompt": "it was not a good"})
    sample: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 10, "rows": 5, "stop": ["e", "o", "A"]})
    sections: dict[str, Any] = field(default_factory=lambda: {"sampling": {"max_new_tokens": 6}})
    reward: Any = writes_o
    level: float = 3.0
    steps: int = 40


def every_text(policy: Policy, prompt: Prompt, longest: int, rewards: Sequence[Any]) -> list[Rollout]:
    """All texts that a policy can write behind a prompt, scored as they are written."""
    narrowing = isinstance(policy, ExtractivePolicy | MaskedPolicy)  # what is taken is no longer there to be taken
    texts = (
        choosing.every_text(policy, prompt, longest)
        if narrowing
        else [  # type: ignore[arg-type]
            list(actions)
            for length in range(1, longest + 1)
            for actions in product(range(policy.actions), repeat=length)
            if not any(one in policy.end_ids for one in actions[:-1])
            and (length == longest or actions[-1] in policy.end_ids)
        ]
    )
    watch, first = Watch(as_rewards(rewards), policy.decoder()), len(prompt.token_ids)
    found = []
    for number, actions in enumerate(texts):
        watch.open(number, prompt)
        watch.feed(number, actions, True)
        drafts = watch.drafts(number)
        characters, char_ends, marks = watch.close(number)
        found.append(
            Rollout(
                id=f"{prompt.id}/{number}",
                group=number,
                prompt=prompt,
                token_ids=[*prompt.token_ids, *actions],
                mask=[False] * first + [True] * len(actions),
                logprobs=[0.0] * (first + len(actions)),
                char_ends=char_ends,
                text=characters,
                marks=marks,
                versions=[-1] * first + [0] * len(actions),
                stop="ended" if policy.over(actions, prompt) else "length",
                drafts=drafts,
            )
        )
    return found


def few_choices(make: Callable[[], Policy], text: str) -> tuple[Policy, Prompt]:
    """A policy that chooses, and a text for it."""
    policy = make()
    return policy, policy.prompts([{"prompt": text}], "prompt", 3)[0]


def chooser(dtype: torch.dtype, make: Callable[[torch.dtype], Policy] = choosing.tiny_extractive) -> Policy:
    """A policy that chooses sentences, not too ready to stop."""
    policy = make(dtype)
    with torch.no_grad():
        policy.model.stop.bias.fill_(-1.0)
    return policy


def editor(dtype: torch.dtype, lora: dict[str, Any] | None = None) -> Policy:
    """A masked model that edits, not too ready to stop."""
    policy = choosing.tiny_masked(dtype, edits=True, lora=lora)
    with torch.no_grad():
        policy.model.order.bias[1] = -1.0
    return policy


def by_the_model(policy: Policy, rollouts: Sequence[Rollout]) -> Tensor:
    """The chances of a causal model's texts, each in a forward pass of its own."""
    found = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.token_ids])
        table = policy.model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
        each = table.gather(2, ids[:, 1:, None])[0, :, 0]
        found.append(each[torch.tensor(rollout.mask[1:])].sum().exp())
    return torch.stack(found)


def by_labels(policy: Policy, rollouts: Sequence[Rollout]) -> Tensor:
    """The chances of a classifier's labels, each in a forward pass of its own."""
    found = []
    for rollout in rollouts:
        read = policy.tokenizer(rollout.prompt.text, return_tensors="pt")
        found.append(policy.model(**read).logits.softmax(-1)[0, rollout.token_ids[0]])
    return torch.stack(found)


def one_text(make: Callable[[torch.dtype], Policy] = tiny_classifier) -> tuple[Policy, Prompt]:
    """A classifier, and a text for it."""
    policy = make(torch.float64)
    return policy, policy.prompts([{"prompt": "the film was great"}], "prompt", 1)[0]


def by_torchs_cells(policy: Policy, rollouts: Sequence[Rollout]) -> Tensor:
    """The chances of a recurrent model's texts, by torch's own LSTM and GRU with the model's weights in them."""
    trunk, config = policy.model.trunk, policy.model.config
    lstm = config.cell == "lstm"
    blocks = [1, 2, 3, 0] if lstm else [0, 1, 2]  # torch's gates: input, forget, candidate, output
    weights = {}
    for number, layer in enumerate(trunk.layers):
        for name, linear in (("ih", layer.inputs), ("hh", layer.carried)):
            bias = torch.zeros_like(layer.inputs.bias) if linear.bias is None else linear.bias
            for what, values in (("weight", linear.weight), ("bias", bias)):
                parts = torch.split(values, config.cell_size)
                weights[f"{what}_{name}_l{number}"] = torch.cat([parts[block] for block in blocks])
    cells = (torch.nn.LSTM if lstm else torch.nn.GRU)(
        config.hidden_size, config.cell_size, config.num_hidden_layers, batch_first=True
    ).double()
    found = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.token_ids])
        states = torch.func.functional_call(cells, weights, (trunk.tokens(ids[:, :-1]),))[0]
        logits = policy.model.head(states if trunk.projection is None else trunk.projection(states))
        each = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
        found.append(each[torch.tensor(rollout.mask[1:])].sum().exp())
    return torch.stack(found)


def letters() -> PreTrainedTokenizerFast:
    """Two letters and the end."""
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(LETTERS)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([LETTERS[-1]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=LETTERS[-1])


def few_letters(model_type: str, **shape: Any) -> tuple[Policy, Prompt]:
    """A causal policy over the letters, and a prompt of two."""
    torch.manual_seed(0)
    size = {"vocab_size": len(LETTERS), "bos_token_id": None, "eos_token_id": 2, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **size, **shape)).double()
    policy = CausalPolicy(exact(model), letters(), torch.float64)
    return policy, Prompt("p", "ab", [0, 1])


def own(kind: str, dtype: torch.dtype, **shape: Any) -> Policy:
    """A policy around a model of the library's own."""
    return tiny_policy(tiny_own(kind, dtype=dtype, **shape), dtype)


@ir.reward(every="token")
def writes_b(view: ir.View) -> float:
    """The same for models of five letters."""
    return 1.0 if "b" in view.piece else 0.0


def from_sources(policy: Policy, rollouts: Sequence[Rollout]) -> Tensor:
    """The chances of an encoder-decoder's texts, each in a forward pass of its own."""
    found = []
    for rollout in rollouts:
        ids, source = torch.tensor([rollout.token_ids]), torch.tensor([rollout.context])
        logits = policy.model(input_ids=source, decoder_input_ids=ids[:, :-1], use_cache=False).logits
        for words in policy.model.generation_config.bad_words_ids or []:  # Marian's padding is never written
            logits[..., words] = -torch.inf
        table = logits.log_softmax(-1)
        each = table.gather(2, ids[:, 1:, None])[0, :, 0]
        found.append(each[torch.tensor(rollout.mask[1:])].sum().exp())
    return torch.stack(found)


def few_from_a_source(shape: str) -> tuple[Policy, Prompt]:
    """An encoder-decoder of nine actions, and a source."""
    policy = tiny_seq2seq(shape)
    return policy, policy.prompts([{"prompt": "ab"}], "prompt", 2)[0]


def seq2seq(shape: str) -> Kind:
    """The entry of an encoder-decoder's shape."""
    return Kind(
        shape,
        partial(tiny_seq2seq, shape),
        partial(few_from_a_source, shape),
        from_sources,
        longest=2,
        rows=({"prompt": "abc de"}, {"prompt": "a"}, {"prompt": "edcba ab cde"}),
        sample={"max_new_tokens": 10, "rows": 5, "stop": ["e", "c"], "temperature": 1.5},
        reward=writes_b,
        level=5.5,
    )


def classifier(name: str, make: Callable[[torch.dtype], Policy], **sections: Any) -> Kind:
    """The entry of a classifier; ``sections`` join those of its runs."""
    return Kind(
        name,
        make,
        partial(one_text, make),
        by_labels,
        longest=1,
        rows=(
            {"prompt": "the film was great", "label": "good"},
            {"prompt": "slow", "label": "bad"},
            {"prompt": ["a film", "not a joy"], "label": "bad"},
        ),
        sample={"max_new_tokens": 10, "rows": 5},
        sections={"sampling": {"max_new_tokens": 1}, **sections},
        reward=right,
        level=0.9,
    )


def extractive(name: str, make: Callable[..., Policy]) -> Kind:
    """The entry of a policy that chooses sentences."""
    return Kind(
        name,
        partial(chooser, make=make),
        partial(few_choices, make, choosing.DOCUMENTS[0]),
        choosing.chances,
        rows=tuple({"prompt": text} for text in (*choosing.DOCUMENTS[:2], "A b. C d. E f. G h. I j.")),
        sample={"max_new_tokens": 5, "rows": 5},
        sections={"sampling": {"max_new_tokens": 3}},
        reward=second_first,
        level=0.8,
    )


def masked(name: str, lora: dict[str, Any] | None, **sections: Any) -> Kind:
    """The entry of a masked model; ``sections`` join those of its runs."""
    return Kind(
        name,
        partial(editor, lora=lora),
        partial(few_choices, partial(choosing.tiny_masked, lora=lora), choosing.BLANKS[0]),
        choosing.chances,
        rows=tuple({"prompt": text} for text in choosing.BLANKS),
        sample={"max_new_tokens": 6, "rows": 5},
        sections={"sampling": {"max_new_tokens": 3}, "train": {"learning_rate": 3e-3}, **sections},
        reward=begins_with_c,
        level=0.5,
    )


LORA = {"rank": 2, "alpha": 4}
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
CELLS = {"hidden_size": 8, "cell_size": 6, "num_hidden_layers": 2, "initializer_range": 0.9}
KINDS = [
    Kind(
        "llama",
        lambda dtype: tiny_policy(tiny_llama(dtype=dtype), dtype),
        partial(few_letters, "llama", intermediate_size=12, num_key_value_heads=1, **SMALL),
        by_the_model,
    ),
    Kind(
        "gpt2",
        lambda dtype: tiny_policy(tiny_gpt2(dtype=dtype), dtype),
        partial(few_letters, "gpt2", n_embd=8, n_layer=2, n_head=2, initializer_range=0.5),
        by_the_model,
    ),
    Kind("transformer", partial(own, "transformer"), partial(few_letters, "transformer", **SMALL), by_the_model),
    Kind("lstm", partial(own, "recurrent"), partial(few_letters, "recurrent", **CELLS), by_torchs_cells),
    Kind(
        "gru",
        partial(own, "recurrent", cell="gru", tie_word_embeddings=False),
        partial(few_letters, "recurrent", cell="gru", tie_word_embeddings=False, **CELLS),
        by_torchs_cells,
    ),
    seq2seq("t5"),
    seq2seq("bart"),
    seq2seq("marian"),
    seq2seq("berts"),
    classifier("classifier", tiny_classifier),
    classifier("classifier with an adapter", partial(tiny_classifier, lora=LORA), model={"lora": LORA}),
    extractive("extractive", choosing.tiny_extractive),
    extractive("extractive by an encoder", choosing.tiny_reading),
    extractive("extractive by a frozen encoder", partial(choosing.tiny_reading, frozen=True)),
    masked("masked", None),
    masked("masked with an adapter", LORA, model={"lora": LORA}),
]
