"""A small model that reads a document sentence by sentence and says which sentence to choose next, from scratch.

A sentence is a bag of words: of each word the bucket that its hash falls into (Weinberger et al., "Feature Hashing for
Large Scale Multitask Learning", 2009), so that any language is read without a vocabulary. Weights for its words are
learned; the Transformer over sentences then sees all of them, their places, and which were chosen in which order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from instant_reward.rewards.growing import stream_of, tokens_of

PADDING, WORDLESS = 0, 1  # the first two buckets: no word, and a sentence of marks alone


class SentencesConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The sizes of a ``SentencesModel``.

    Args:
        buckets: how many there are for words; more tell more words apart.
        hidden_size, layers, heads: of the Transformer over sentences.
        max_sentences: the longest document, in sentences.
        max_words: of longer sentences only so many words are read.
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
        **rest: Any,
    ) -> None:
        self.buckets, self.hidden_size, self.layers, self.heads = buckets, hidden_size, layers, heads
        self.max_sentences, self.max_words = max_sentences, max_words
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
        self.words = nn.Embedding(config.buckets, width)
        self.weight = nn.Linear(width, 1)
        self.bag = nn.Linear(2 * width + 1, width)
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
        device = self.place.weight.device
        longest = max(len(document) for document in documents)
        widest = max(len(words) for document in documents for words in document)
        ids = torch.full((len(documents), longest, widest), PADDING, dtype=torch.long)
        for row, document in enumerate(documents):
            for number, words in enumerate(document):
                ids[row, number, : len(words)] = torch.tensor(words)
        ids = ids.to(device)
        known = ids != PADDING
        count = known.sum(-1, keepdim=True)
        words = self.words(ids)
        worth = self.weight(words).squeeze(-1)
        share = worth.masked_fill(~known, torch.finfo(worth.dtype).min).softmax(-1) * known
        weighted = (share[..., None] * words).sum(2)
        mean = (words * known[..., None]).sum(2) / count.clamp(min=1)
        length = count.to(words.dtype).clamp(min=1).log()
        bag = self.bag(torch.cat([weighted, mean, length], -1))
        return bag + self.place.weight[:longest], count.squeeze(-1) > 0


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


def buckets_of(sentence: str, config: SentencesConfig) -> list[int]:
    """The buckets of a sentence's words, in order, cut at ``max_words``; never empty."""
    words = tokens_of(stream_of("auto"), sentence)[: config.max_words]
    return [2 + _hash(word) % (config.buckets - 2) for word in words] or [WORDLESS]


@lru_cache(maxsize=65536)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(errors="replace"), digest_size=8).digest(), "little")
