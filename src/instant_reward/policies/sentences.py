"""A small model that reads a document sentence by sentence and says which sentence to choose next, from scratch.

A sentence is a bag of words: of each word the bucket that its hash falls into (Weinberger et al., "Feature Hashing for
Large Scale Multitask Learning", 2009), so that any language is read without a vocabulary. Weights for its words are
learned. Or a pretrained encoder of tokens reads it, and its vector is the mean of their states. The Transformer over
sentences then sees all of them, their places, and which were chosen in which order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from instant_reward.rewards.growing import stream_of, tokens_of

PADDING, WORDLESS = 0, 1  # the first two buckets: no word, and a sentence of marks alone
KEPT = 100_000  # vectors of sentences that a frozen encoder keeps


class SentencesConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The sizes of a ``SentencesModel``.

    Args:
        buckets: how many there are for words; more tell more words apart.
        hidden_size, layers, heads: of the Transformer over sentences.
        max_sentences: the longest document, in sentences.
        max_words: of longer sentences only so many words are read; with an encoder, tokens.
        reader: the config of an encoder of tokens that reads the sentences, as plain values; None for bags of words.
        frozen: the encoder stays as it is; its vectors of sentences are then kept.
    """

    model_type = "sentences"

    def __init__(
        self,
        buckets: int = 8192,
        hidden_size: int = 64,
        layers: int = 2,
        heads: int = 4,
        max_sentences: int = 32,
        max_words: int = 48,
        reader: dict[str, Any] | None = None,
        frozen: bool = True,
        **rest: Any,
    ) -> None:
        self.buckets, self.hidden_size, self.layers, self.heads = buckets, hidden_size, layers, heads
        self.max_sentences, self.max_words = max_sentences, max_words
        self.reader, self.frozen = reader, frozen
        super().__init__(**rest)


class SentencesModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """An encoder of sentences with a score for each and one for stopping."""

    config_class = SentencesConfig
    base_model_prefix = "encoder"

    def __init__(self, config: SentencesConfig) -> None:
        super().__init__(config)
        self.encoder = SentenceEncoder(config)
        self.choose = nn.Linear(config.hidden_size, 1)
        self.stop = nn.Linear(config.hidden_size, 1)
        self.post_init()  # type: ignore[no-untyped-call]
        for head in (self.choose, self.stop):  # all choices alike: a policy that is sure by chance explores nothing
            nn.init.zeros_(head.weight)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)

    def scores(self, states: Tensor, sentences: Tensor) -> Tensor:
        """The logits ``[N, 1 + S]`` of stopping (0) and of each sentence, from what ``encoder`` returns."""
        return torch.cat([self.stop(states), self.choose(sentences).squeeze(-1)], 1)


class SentenceEncoder(nn.Module):
    """Documents and what was chosen of them, as vectors."""

    def __init__(self, config: SentencesConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.sentences: Any = Bags(config) if config.reader is None else TokenReader(config)
        self.place = nn.Embedding(config.max_sentences, width)
        self.turn = nn.Embedding(config.max_sentences + 1, width)  # 0: not chosen yet; else as which one
        self.whole = nn.Embedding(config.max_sentences + 1, width)  # stands before the sentences: how many were chosen
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, vectors: Tensor, there: Tensor, rows: Tensor, taken: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the model knows before each of ``N`` choices.

        Args:
            vectors, there: what ``read`` made of the documents.
            rows: int64 ``[N]``, of each choice its document.
            taken: of each choice the sentences chosen before it, in order; 0 is the first.

        Returns:
            The state ``[N, D]``, the sentences' ``[N, S, D]``, and what is open to be chosen, bool ``[N, S]``.
        """
        turns = torch.zeros(len(taken), vectors.shape[1], dtype=torch.long)
        for row, chosen in enumerate(taken):
            for turn, sentence in enumerate(chosen, start=1):
                turns[row, sentence] = turn
        turns, there = turns.to(vectors.device), there[rows]
        begin = self.whole(turns.amax(1, keepdim=True))
        states = torch.cat([begin, vectors[rows] + self.turn(turns)], 1)
        seen = torch.nn.functional.pad(there, (1, 0), value=True)[:, None, None, :]
        for block in self.blocks:
            states = block(states, seen)
        states = self.norm(states)
        return states[:, 0], states[:, 1:], there & (turns == 0)

    def read(self, documents: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor]:
        """Vectors of the sentences of ``M`` documents, ``[M, S, D]``, and where there is one, bool ``[M, S]``."""
        longest = max(len(document) for document in documents)
        vectors = self.sentences([words for document in documents for words in document])
        there = torch.arange(longest) < torch.tensor([len(document) for document in documents])[:, None]
        there = there.to(vectors.device)
        places = self.place.weight[:longest].expand(len(documents), -1, -1)
        vectors = vectors + places[there]
        return places.to(vectors.dtype).masked_scatter(there[..., None], vectors), there


class Bags(nn.Module):
    """The vectors of sentences as bags of words."""

    def __init__(self, config: SentencesConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.words = nn.Embedding(config.buckets, width)
        self.weight = nn.Linear(width, 1)
        self.bag = nn.Linear(2 * width + 1, width)

    def forward(self, sentences: Sequence[Sequence[int]]) -> Tensor:
        """``[K, D]`` of the buckets of the words of ``K`` sentences."""
        ids, known = _padded(sentences, PADDING, self.words.weight.device)
        count = known.sum(-1, keepdim=True)
        words = self.words(ids)
        worth = self.weight(words).squeeze(-1)
        share = worth.masked_fill(~known, torch.finfo(worth.dtype).min).softmax(-1) * known
        weighted = (share[..., None] * words).sum(1)
        mean = (words * known[..., None]).sum(1) / count
        vectors: Tensor = self.bag(torch.cat([weighted, mean, count.to(words.dtype).log()], -1))
        return vectors


class TokenReader(nn.Module):
    """The vectors of sentences by an encoder of tokens: the mean of their states, and a linear layer to this width."""

    def __init__(self, config: SentencesConfig) -> None:
        super().__init__()
        assert config.reader is not None, "the config names no encoder"
        values = {key: value for key, value in config.reader.items() if key != "model_type"}
        made = AutoConfig.for_model(config.reader["model_type"], **values)
        self.model: Any = AutoModel.from_config(made, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
        if hasattr(self.model, "pooler"):
            self.model.pooler = None  # which reads the states that are averaged here
        self.bag = nn.Linear(made.hidden_size, config.hidden_size)
        self.frozen = config.frozen
        self._known = Known()

    def forward(self, sentences: Sequence[Sequence[int]]) -> Tensor:
        """``[K, D]`` of the token ids of ``K`` sentences."""
        keys = [tuple(one) for one in sentences]
        distinct = list(dict.fromkeys(keys))
        found = self._kept(distinct) if self.frozen else dict(zip(distinct, self._means(distinct), strict=True))
        vectors: Tensor = self.bag(torch.stack([found[key] for key in keys]).to(self.bag.weight))
        return vectors

    @torch.no_grad()
    def _kept(self, sentences: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """The vectors of sentences, which are read once."""
        self.model.eval()  # a frozen encoder drops out nothing, whatever the layers behind it do
        if len(self._known) > KEPT:
            self._known.clear()
        # One at a time: a resumed run would read them in other company, beside which a vector is rounded otherwise.
        self._known |= {one: self._means([one])[0] for one in sentences if one not in self._known}
        return {one: self._known[one] for one in sentences}

    def _means(self, sentences: Sequence[tuple[int, ...]]) -> Tensor:
        ids, known = _padded(sentences, 0, self.bag.weight.device)
        states = self.model(input_ids=ids, attention_mask=known.long()).last_hidden_state
        means: Tensor = (states * known[..., None]).sum(1) / known.sum(1, keepdim=True)
        return means


class Known(dict[tuple[int, ...], Tensor]):
    """What a frozen encoder said of sentences; copies of its model (a sampler's, a reference) would say the same."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Known:
        return self


def _padded(sentences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[K, W]`` of ``K`` sentences, and where there is something, bool."""
    lengths = torch.tensor([len(one) for one in sentences])
    widest = int(lengths.max())
    ids = torch.full((len(sentences), widest), pad_id, dtype=torch.long)
    for row, one in enumerate(sentences):
        ids[row, : len(one)] = torch.tensor(one)
    return ids.to(device), (torch.arange(widest) < lengths[:, None]).to(device)


class Block(nn.Module):
    """A layer of a Transformer, norms first, without dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.look, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: Tensor, seen: Tensor) -> Tensor:
        """``[N, S, D]``; ``seen`` is what may be looked at, bool ``[N, 1, 1, S]``."""
        rows, length, width = states.shape
        parts = self.look(self.before(states)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        looked = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        states = states + self.out(looked.transpose(1, 2).reshape(rows, length, width))
        more: Tensor = self.down(torch.nn.functional.gelu(self.up(self.between(states))))
        return states + more


AutoConfig.register(SentencesConfig.model_type, SentencesConfig)


def buckets_of(sentence: str, config: SentencesConfig) -> list[int]:
    """The buckets of a sentence's words, in order, cut at ``max_words``; never empty."""
    words = tokens_of(stream_of("auto"), sentence)[: config.max_words]
    return [2 + _hash(word) % (config.buckets - 2) for word in words] or [WORDLESS]


@lru_cache(maxsize=65536)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(errors="replace"), digest_size=8).digest(), "little")
