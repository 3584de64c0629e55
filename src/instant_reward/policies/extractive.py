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
READING = ("buckets", "max_words", "max_sentences")  # what two models must share to read the same
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
    """

    same_actions = False
    end_ids = (STOP,)

    def __init__(self, model: Any, compute: torch.dtype = torch.float32, name: str = "") -> None:
        super().__init__(model, None, compute, None, name)

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
        model = _load(name, self.compute).to(self.device)
        differing = [key for key in READING if getattr(model.config, key) != getattr(self.model.config, key)]
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
        """See ``DecisionPolicy``: nothing for stopping, and the sentences."""
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
        context = [buckets_of(sentence, self.model.config) for sentence in sentences]
        return Prompt(id=str(row.get("id", number)), text=text, token_ids=[], info=info, context=context)

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
    return ExtractivePolicy(_load(name, compute).to(place), compute, name)


def _load(name: str, compute: torch.dtype) -> Any:
    folder = models.locate(name)
    model, found = read_folder(folder, SentencesModel.from_pretrained, dtype=master(compute), output_loading_info=True)
    check_found(folder, found, SentencesModel.__name__)
    return model


def new_extractive(values: Mapping[str, Any], seed: int, compute: torch.dtype, place: str) -> ExtractivePolicy:
    """A policy with new weights.

    Args:
        values: of its ``SentencesConfig``, and ``model_type``.

    Raises:
        UserError: where one is unknown or does not fit.
    """
    known = [key for key in inspect.signature(SentencesConfig.__init__).parameters if key not in ("self", "rest")]
    sizes = {key: value for key, value in values.items() if key != "model_type"}
    for key, value in sizes.items():
        if key not in known:
            raise UserError(f"model.scratch.config.{key}: sentences has no such key; it has {', '.join(known)}")
        if not isinstance(value, int) or value < (3 if key == "buckets" else 1):
            raise UserError(f"model.scratch.config.{key}: {value!r} must be a number above 0 (buckets: above 2)")
    config = SentencesConfig(**sizes)
    if config.hidden_size % config.heads:
        raise UserError("model.scratch.config.hidden_size: it must be a multiple of heads")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = SentencesModel(config)
    return ExtractivePolicy(model.to(place, master(compute)), compute)
