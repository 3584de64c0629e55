"""A model that begins with new weights, and a tokenizer that is trained on the run's own texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, field_validator, model_validator

from instant_reward.config_section import Count, Section, Text, Whole

KINDS = ("bpe", "wordpiece", "character", "word")


def _different(value: list[str]) -> list[str]:
    if value and (len(value) < 2 or len(set(value)) < len(value)):
        raise ValueError("needs at least two labels that differ")
    return value


Labels = Annotated[list[Text], AfterValidator(_different)]
"""Of a classifier, in the order of its outputs; none for other models."""


class TokenizerConfig(Section):
    """A tokenizer trained on the run's texts, or the one in ``folder``.

    Attributes:
        kind: byte-level BPE, WordPiece, characters, or words.
        vocabulary: how many tokens it has at most, special ones included.
        minimum: how often a pair, a word or a character must come up to become a token.
        lower: everything in lower case.
        stop_words: words that are left out, of kind word.
        columns: the columns of the data with the texts; the prompts and completions when left out.
    """

    short = "kind"
    kind: Literal["bpe", "wordpiece", "character", "word"] = "bpe"
    vocabulary: Count = 4000
    minimum: Count = 2
    lower: bool = False
    stop_words: list[Text] = []
    columns: list[Text] = []
    folder: Text | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.folder is not None and self.model_fields_set - {"folder"} and self != type(self)(folder=self.folder):
            raise ValueError("the tokenizer in the folder is taken as it is; leave out the rest")
        if self.stop_words and self.kind != "word":
            raise ValueError("stop_words are left out by kind word alone; leave them out, or use that kind")
        return self


class ScratchConfig(Section):
    """A model with new weights.

    Attributes:
        kind: "masked" for a model that fills masks; without it the type and the labels say what the model does.
        config: plain values of the Hugging Face config that ``model_type`` names. The vocabulary's size and the special
            tokens' ids are the tokenizer's. Of a masked model, ``edits`` too.
        labels: of a classifier; a model that writes text has none.
        seed: draws the weights.
    """

    kind: Literal["masked"] | None = None
    config: dict[str, Any]
    tokenizer: TokenizerConfig = TokenizerConfig()
    labels: Labels = []
    seed: Whole = 0

    @field_validator("config")
    @classmethod
    def _model_type(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("model_type"), str):
            raise ValueError("needs a model_type: a kind of model that transformers knows, such as gpt2 or llama")
        return value

    @model_validator(mode="after")
    def _no_labels(self) -> Self:
        if self.kind is not None and self.labels:
            raise ValueError("a masked model writes tokens and a classifier chooses labels; leave out kind or labels")
        return self
