"""A policy that chooses sentences of a document, one after the other: a summary by extraction.

Action 0 stops; action ``k`` chooses the document's ``k``-th sentence, which cannot be chosen again. The text is the
chosen sentences in the order of choice: with ``every="token"`` a reward sees each as it is chosen.
Source: the choice of sentences as a policy whose reward is ROUGE is Narayan, Cohen and Lapata, "Ranking Sentences for
Extractive Summarization with Reinforcement Learning" (2018); here each choice is paid what it changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from instant_reward import models
from instant_reward.batch import Batch
from instant_reward.policies import terms
from instant_reward.policies.decisions import PLAIN, DecisionPolicy, Names, Steps, cell, decided
from instant_reward.policies.head import Softmax
from instant_reward.policies.load import Dtype, check_found, compute_dtype, master, read_folder
from instant_reward.policies.sentences import SentencesConfig, SentencesModel, buckets_of
from instant_reward.text import Decoder, Pieces
from instant_reward.types import Prompt, UserError

STOP = 0
READING = ("buckets", "max_words", "max_sentences", "reader")  # what two models must share to read the same
UNKNOWN = "model.scratch.config"
Read = tuple[Tensor, Tensor]  # what ``SentenceEncoder.read`` makes of documents


class Documents:
    """Reads batches of choices with sentence encoders (``Reader``)."""

    def trunk(self, model: Any) -> Any:
        """See ``Reader``."""
        return model.encoder

    def width(self, base: Any) -> int:
        """See ``Reader``."""
        return int(base.config.hidden_size)

    def of_sampled(self, base: Any, batch: Batch) -> Tensor:
        """See ``Reader``."""
        contexts, steps = decided(batch, base.place.weight.device)
        states: Tensor = base(*base.read(contexts), steps.rows, _taken(steps))[0]
        return states


class ExtractivePolicy(DecisionPolicy):
    """A model that chooses sentences of a document.

    Args:
        model: a ``SentencesModel``.
        compute: the dtype of the matrix products.
        tokenizer: of the encoder of tokens that reads the sentences, where there is one.
    """

    same_actions = False
    end_ids = (STOP,)

    def __init__(self, model: Any, compute: torch.dtype = torch.float32, name: str = "", tokenizer: Any = None) -> None:
        if tokenizer is not None:
            model.encoder.sentences.model.requires_grad_(not model.config.frozen)
        super().__init__(model, tokenizer, compute, None, name)

    @property
    def context(self) -> int:
        """How many sentences the model can read."""
        return int(self.model.config.max_sentences)

    def actions_in(self, model: Any) -> int:
        """See ``Learning``: stopping, and the sentences of the longest document."""
        return 1 + int(model.config.max_sentences)

    def new_states(self) -> Documents:
        """See ``Learning``."""
        return Documents()

    def load_beside(self, name: str, what: str) -> Any:
        """See ``Learning``: another model that reads sentences as this one does."""
        model, tokenizer = _load(name, self.compute)
        model = model.to(self.device)
        differing = [key for key in READING if getattr(model.config, key) != getattr(self.model.config, key)]
        if tokenizer is not None and not differing and tokenizer.get_vocab() != self.tokenizer.get_vocab():
            differing = ["tokenizer"]
        if differing:
            raise UserError(
                f"{what}: {name} has another {differing[0]} than the policy, so it reads other words; use another"
            )
        return model.eval().requires_grad_(False)

    def read(self, model: Any, contexts: Sequence[Any]) -> Read:
        """See ``DecisionPolicy``: the sentences' vectors."""
        with self.autocast():
            read: Read = model.encoder.read(contexts)
        return read

    def choose(
        self, model: Any, encoded: Read, steps: Steps, no_end: Tensor, softmax: Softmax = PLAIN
    ) -> terms.Distribution:
        """See ``DecisionPolicy``: a score for stopping and for each sentence that was not chosen."""
        with self.autocast():
            state, sentences, free = model.encoder(*encoded, steps.rows, _taken(steps))
            scores = model.scores(state, sentences)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        free = torch.nn.functional.pad(free, (1, 0), value=True)
        return terms.Choices(state, wide.masked_fill(~free, -torch.inf), no_end, softmax)

    def over(self, actions: Sequence[int], prompt: Prompt) -> bool:
        """See ``Policy``: where it stopped, or no sentence is left."""
        assert prompt.context is not None, "the prompt is none of this policy's"
        return actions[-1] == STOP or len(actions) == len(prompt.context)

    def names(self, prompt: Prompt) -> list[str]:
        """What each action adds to a text: stopping nothing, and the others their sentences."""
        return ["", *(sentence.strip() for sentence in split(prompt.text))]

    def decoder(self) -> Decoder:
        """See ``Policy``: the chosen sentences, with a space between them where the document has one."""
        return Names(self.names, glue)

    def prompts(
        self, rows: Sequence[Mapping[str, Any]], column: str, room: int, most: int | None = None
    ) -> list[Prompt]:
        """See ``Policy``: a row's document is split into sentences; its other columns are ``info``."""
        limit = min(self.context, most or self.context)
        return [self._prompt(row, column, number, limit) for number, row in enumerate(rows)]

    def _prompt(self, row: Mapping[str, Any], column: str, number: int, limit: int) -> Prompt:
        where, text = cell(row, column, number)
        if not isinstance(text, str):
            raise UserError(f"{where} has a {type(text).__name__} for a document: give text.")
        sentences = split(text)
        if not sentences:
            raise UserError(f"{where} has a document without a sentence: give it one, or leave that row out.")
        if len(sentences) > limit:
            raise UserError(
                f"{where} has a document of {len(sentences)} sentences, and the model reads {limit}: shorten it, or "
                "make a model with more max_sentences."
            )
        info = {key: value for key, value in row.items() if key not in (column, "id")}
        context = [self._units(sentence) for sentence in sentences]
        return Prompt(id=str(row.get("id", number)), text=text, token_ids=[], info=info, context=context)

    def _units(self, sentence: str) -> list[int]:
        """What the model reads of a sentence: its words' buckets, or its tokens."""
        config = self.model.config
        if self.tokenizer is None:
            return buckets_of(sentence, config)
        return list(self.tokenizer(sentence.strip(), truncation=True, max_length=config.max_words)["input_ids"])

    def actions_of(self, text: str, prompt: Prompt) -> list[int]:
        """See ``Policy``: the text's sentences in its order, each one of the document's.

        Raises:
            UserError: where one is none of them, or comes twice.
        """
        names = self.names(prompt)
        chosen = []
        for sentence in split(text):
            left = [k for k, name in enumerate(names) if name == sentence.strip() and k not in chosen]
            if not left:
                raise UserError(
                    f"prompt {prompt.id}: the summary's sentence {sentence.strip()[:40]!r} is no further one of the "
                    "document; take whole sentences of it, each once"
                )
            chosen.append(left[0])
        return chosen if chosen and self.over(chosen, prompt) else [*chosen, STOP]


def split(document: str) -> list[str]:
    """The sentences of a document, in any script, each with the white space before it."""
    ends = Pieces("sentence").ends(document, 0, True)
    found = [document[start:end] for start, end in pairwise([0, *ends])]
    return [sentence for sentence in found if sentence.strip()]


def glue(prompt: Prompt) -> str:
    """What stands between the chosen sentences: a space, unless the document puts none between its own."""
    sentences = split(prompt.text)
    return " " if len(sentences) < 2 or any(one[:1].isspace() for one in sentences[1:]) else ""


def _taken(steps: Steps) -> list[list[int]]:
    return [[action - 1 for action in before] for before in steps.before]


def load_extractive(name: str, dtype: Dtype, lora: Mapping[str, Any] | None, place: str) -> ExtractivePolicy:
    """See ``kinds.load_policy``."""
    if lora is not None:
        raise UserError("model.lora: a model that chooses sentences is small and trained whole; leave it out")
    compute = compute_dtype(dtype, place)
    model, tokenizer = _load(name, compute)
    return ExtractivePolicy(model.to(place), compute, name, tokenizer)


def _load(name: str, compute: torch.dtype) -> tuple[Any, Any]:
    """A model, and the tokenizer of its encoder of tokens where it has one."""
    from transformers import AutoTokenizer

    folder = models.locate(name)
    model, found = read_folder(folder, SentencesModel.from_pretrained, dtype=master(compute), output_loading_info=True)
    check_found(folder, found, SentencesModel.__name__)
    return model, None if model.config.reader is None else read_folder(folder, AutoTokenizer.from_pretrained)


def new_extractive(values: Mapping[str, Any], seed: int, compute: torch.dtype, place: str) -> ExtractivePolicy:
    """A policy with new weights; those of a pretrained ``encoder`` are its folder's.

    Args:
        values: of its ``SentencesConfig``, and ``model_type``.

    Raises:
        UserError: where one is unknown or does not fit.
    """
    sizes = {key: value for key, value in values.items() if key not in ("model_type", "encoder")}
    _check_sizes(sizes, "encoder" in values)
    encoder = tokenizer = None
    if "encoder" in values:
        encoder, tokenizer = _encoder(values["encoder"], compute)
        sizes["reader"] = {key: one for key, one in encoder.config.to_diff_dict().items() if key != "dtype"}
    config = SentencesConfig(**sizes)
    if config.hidden_size % config.heads:
        raise UserError(f"{UNKNOWN}.hidden_size: it must be a multiple of heads")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = SentencesModel(config)
    if encoder is not None:
        limit = getattr(encoder.config, "max_position_embeddings", config.max_words)
        if config.max_words > limit:
            raise UserError(f"{UNKNOWN}.max_words: the encoder reads {limit} tokens; set it to {limit} or less")
        reader, weights = model.encoder.sentences.model, encoder.state_dict()
        reader.load_state_dict({key: weights[key] for key in reader.state_dict()})
    return ExtractivePolicy(model.to(place, master(compute)), compute, tokenizer=tokenizer)


def _check_sizes(sizes: Mapping[str, Any], reads_tokens: bool) -> None:
    named = inspect.signature(SentencesConfig.__init__).parameters
    known = [key for key in named if key not in ("self", "rest", "reader")]
    for key, value in sizes.items():
        if key not in known:
            raise UserError(f"{UNKNOWN}.{key}: sentences has no such key; it has {', '.join([*known, 'encoder'])}")
        if key == "buckets" and reads_tokens:
            raise UserError(f"{UNKNOWN}.buckets: the encoder has tokens of its own; leave it out")
        if key == "frozen" and not (reads_tokens and isinstance(value, bool)):
            what = (
                f"{value!r} must be true or false" if reads_tokens else "there is no encoder; leave it out, or name one"
            )
            raise UserError(f"{UNKNOWN}.frozen: {what}")
        least = 3 if key == "buckets" else 1
        if key != "frozen" and (not isinstance(value, int) or value < least):
            raise UserError(f"{UNKNOWN}.{key}: {value!r} must be a number above {least - 1}")


def _encoder(name: Any, compute: torch.dtype) -> tuple[Any, Any]:
    """A pretrained encoder of tokens, and its tokenizer.

    Raises:
        UserError: there is none, or it is an encoder-decoder.
    """
    from transformers import AutoModel, AutoTokenizer

    if not isinstance(name, str):
        raise UserError(f"{UNKNOWN}.encoder: {name!r} must be a model's folder or hub id")
    folder = models.locate(name)
    tokenizer = read_folder(folder, AutoTokenizer.from_pretrained)
    encoder, found = read_folder(folder, AutoModel.from_pretrained, dtype=master(compute), output_loading_info=True)
    missing = [key for key in found["missing_keys"] if not key.startswith("pooler.")]  # which nobody reads here
    check_found(folder, {"missing_keys": missing}, type(encoder).__name__)
    if encoder.config.is_encoder_decoder or not hasattr(encoder.config, "hidden_size"):
        raise UserError(f"{UNKNOWN}.encoder: {name} is no encoder alone; name one of BERT's shape, such as MiniLM")
    return encoder, tokenizer
