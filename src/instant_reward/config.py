"""The config of a run: plain values and import paths (torch-free), from YAML with dotted overrides.

``Config.load`` reports everything that is wrong at once, each problem with its dotted path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from instant_reward.config_algorithm import AlgorithmConfig as AlgorithmConfig
from instant_reward.config_data import LoggedConfig as LoggedConfig
from instant_reward.config_data import MasksConfig as MasksConfig
from instant_reward.config_problems import report, sentences
from instant_reward.config_scratch import Labels
from instant_reward.config_scratch import ScratchConfig as ScratchConfig
from instant_reward.config_section import Count, Fraction, NotNegative, Positive, Section, Text, Whole
from instant_reward.config_split import PARTS as PARTS
from instant_reward.config_split import SplitConfig as SplitConfig
from instant_reward.config_train import ReplayConfig as ReplayConfig
from instant_reward.config_train import StopWhen as StopWhen
from instant_reward.config_train import TrainConfig as TrainConfig
from instant_reward.config_weight import Planned, Weight, least
from instant_reward.imports import resolve as resolve
from instant_reward.presets import preset_of
from instant_reward.rewards.names import import_path
from instant_reward.yaml_values import apply_overrides, read_mapping, to_yaml

SCRATCH = "scratch"
PIECES = ("token", "word", "sentence", "line", "end")


class LoraConfig(Section):
    """Low-rank adapters instead of full fine-tuning. ``targets``: "all-linear", or the names of the layers."""

    rank: Count = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Text | list[Text] = "all-linear"


class ModelConfig(Section):
    """The model: a short name, a local folder, a GGUF file or a hub id; or one from ``scratch``, whose name is then
    "scratch". ``max_context`` counts prompt and text. ``labels`` make a classifier of an encoder that has none; the
    layer that scores them is drawn by the run's seed."""

    short = "name"
    name: Text = "smollm2-135m"
    scratch: ScratchConfig | None = None
    labels: Labels = []
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    lora: LoraConfig | None = None
    max_context: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("scratch") is None:
            return values
        if values.get("name", SCRATCH) != SCRATCH:
            raise ValueError("name and scratch are two models; leave out one of them")
        return {**values, "name": SCRATCH}

    @model_validator(mode="after")
    def _all_new(self) -> Self:
        if self.scratch is not None and self.lora is not None:
            raise ValueError("an adapter would leave the new weights of scratch as they were drawn; leave out lora")
        if self.scratch is not None and self.labels:
            raise ValueError("labels make a classifier of the model in name; give those of a new model under scratch")
        if self.scratch is None and self.name == SCRATCH:
            raise ValueError("the name scratch is for models with new weights; say which under scratch")
        return self

    @property
    def drawn(self) -> bool:
        """Whether the run begins with weights that are drawn, all or some, and so lie in no folder but its own."""
        return self.scratch is not None or bool(self.labels)


class DataConfig(Section):
    """Where prompts come from: exactly one of ``path`` (a file), ``use`` (``module:function``, called with ``args``),
    ``prompts`` (texts, lists of messages, or mappings of columns) and ``rollouts`` (a run's ``samples.jsonl``: whole
    texts to learn from, none is sampled). ``completion`` names a column with the texts to learn from instead; they
    stand behind the prompt in ``column``, or, where that is None, behind the model's opening token alone.
    ``logged`` says that the rows are a log of decisions, to learn from those. Two names in ``column`` make a pair of
    texts, for a classifier.

    Attributes:
        too_long: a text to learn from that the model cannot read at once is refused, cut off, or split into several
            (``model.max_context`` bounds it further).
        masks: for a masked model: random tokens of these texts are masked, and what stood there is to be learned.
        columns: new names of columns, each with the file's own: ``{prompt: question}``; everything else here means the
            new names.
        encoding: of a text file, such as gb18030.
        unique: leave out rows whose value in this column came before.
        split: the parts of the data, as fractions of its rows or as a file each; ``part`` is the one taken.
        limit: the first so many rows of what is left.
        stream: rows, prompts and texts lie in a temporary file and are read when a step needs them, for data that is
            larger than memory.
    """

    short = "path"
    path: Text | None = None
    use: Text | None = None
    prompts: list[Any] | None = None
    rollouts: Text | None = None
    column: Text | Annotated[list[Text], Field(min_length=2, max_length=2)] | None = "prompt"
    completion: Text | None = None
    too_long: Literal["refuse", "cut", "split"] = "refuse"
    masks: MasksConfig | None = None
    logged: LoggedConfig | None = None
    args: dict[str, Any] = {}
    limit: Count | None = None
    columns: dict[str, Text] = {}
    encoding: Text = "utf-8"
    unique: Text | None = None
    split: SplitConfig | None = None
    part: Literal["train", "validation", "test"] = "train"
    stream: bool = False

    @property
    def prompt_column(self) -> str | None:
        """Where the loaded rows have their prompt; a pair of columns is put together under "prompt"."""
        return "prompt" if isinstance(self.column, list) else self.column

    @property
    def given(self) -> bool:
        """Whether the texts are given with it, and none is sampled."""
        return self.rollouts is not None or self.completion is not None or self.logged is not None

    @field_validator("use")
    @classmethod
    def _use(cls, value: str | None) -> str | None:
        return None if value is None else _import_path(value)

    @field_validator("prompts")
    @classmethod
    def _prompts(cls, value: list[Any] | None) -> list[Any] | None:
        if value is not None and not value:
            raise ValueError("is empty; give at least one prompt")
        for index, prompt in enumerate(value or []):
            if not isinstance(prompt, str | list | dict) or not prompt:
                raise ValueError(f"item {index} must be a text, a list of messages or a mapping, not {prompt!r}")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("path", "use", "prompts", "rollouts") if getattr(self, name) is not None]
        given += ["split's files"] if self.split is not None and self.split.files else []
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, use, prompts and rollouts (there {_are(given)})")
        if self.rollouts is not None and (self.completion is not None or self.logged is not None):
            raise ValueError("rollouts are whole texts already; leave out completion and logged")
        if self.completion is not None and self.logged is not None:
            raise ValueError("logged names the column of the actions itself; leave out completion")
        shaped = [name for name in ("args", "limit", "columns", "unique", "split", "stream") if getattr(self, name)]
        shaped += ["column"] if self.column != "prompt" else []
        if self.rollouts is not None and shaped:
            raise ValueError(f"rollouts are taken as they are; leave out {' and '.join(shaped)}")
        if self.part not in ({"train"} if self.split is None else {*self.split.fractions, *self.split.files}):
            raise ValueError(f"part is {self.part}, which split does not name; add it there")
        if self.column is None and self.completion is None:
            raise ValueError("column is None, so there are no prompts; name the column of the texts by completion")
        if self.too_long != "refuse" and self.completion is None:
            raise ValueError("too_long is about whole texts; name their column by completion, or leave it out")
        if self.masks is not None and (self.completion is None or self.column is not None):
            raise ValueError("masks are put into whole texts: name their column by completion, and set column to null")
        return self


class RewardConfig(Section):
    """One reward: the function ``use``, called with ``args`` first where there are any.

    Attributes:
        use: a short name (``rewards/names.py``), ``module:name``, or a file as ``folder/file.py:name``.
        name: what its marks are called; the function's name when left out.
        weight: in the sum that is learned from: a number, or a rule by which it changes while the run goes on
            (``config_weight``), such as ``{rule: linear, start: 1, end: 0, steps: 100}``.
        scaled: divide by the running deviation of what texts earn from it; clip: bound each of its marks.
        discount: per token; the algorithm's when left out.
        every: where pieces end ("token", "word", "sentence", "line", "end", a number of tokens, or ``module:name``);
            the function's own when left out.
        at: where a mark is paid: "seen" (exact), or on its "span" (biased).
        change: pay the change of the score at each piece, from the empty text's on.
        potential: pay it as a potential beside a final reward, shaped for this reward's ``discount``.
        workers: rate it in so many worker processes, with ``time_limit`` seconds a call; ``on_error`` "none" gives None
            for a call that fails there, and warns, where "raise" ends the run (``rewards/workers.py``).
        train: False for a reward that is only watched.
    """

    short = "use"
    use: Text
    name: Text | None = None
    weight: Weight = 1.0
    scaled: bool = False
    clip: Positive | None = None
    discount: Annotated[float, Field(ge=0, le=1)] | None = None
    every: Annotated[str | int | None, Field(union_mode="left_to_right")] = None
    at: Literal["seen", "span"] = "seen"
    change: bool = False
    potential: bool = False
    args: dict[str, Any] = {}
    workers: Count | None = None
    time_limit: Positive = 5.0
    on_error: Literal["raise", "none"] = "raise"
    train: bool = True

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.change and self.potential:
            raise ValueError("a score is paid by its change or as a potential; leave out change or potential")
        if self.workers is None and (self.time_limit != 5.0 or self.on_error != "raise"):
            raise ValueError("time_limit and on_error are about worker processes; set workers, or leave them out")
        return self

    @property
    def label(self) -> str:
        """The name its marks carry: ``name``, else the last part of ``use``."""
        return self.name or self.use.rpartition(":")[2]

    @field_validator("use")
    @classmethod
    def _use(cls, value: str) -> str:
        import_path(value)
        return value

    @field_validator("every", mode="before")
    @classmethod
    def _every(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in PIECES and ":" not in value:
            raise ValueError(f"must be one of {', '.join(PIECES)}, a number of tokens or module:name, not {value!r}")
        if value is not None and not isinstance(value, str) and (type(value) is not int or value < 1):
            raise ValueError(f"must be the name of a piece or a number of tokens from 1, not {value!r}")
        return value


class SamplingConfig(Section):
    """How texts are drawn. ``rows``: texts decoded side by side; ``stop_lag``: decoding steps until a stopped text's
    row is free again, the same for fast and slow rewards. ``guide``: so many times Q - V of "ilql" join the logits."""

    max_new_tokens: Count = 32
    min_new_tokens: Whole = 0
    temperature: Positive = 1.0
    top_p: Fraction = 1.0
    top_k: Whole = 0
    stop: list[Text] = []
    rows: Count = 64
    stop_lag: Whole = 4
    guide: NotNegative = 0.0

    @field_validator("min_new_tokens")
    @classmethod
    def _min(cls, value: int, info: Any) -> int:
        most = info.data.get("max_new_tokens", math.inf)
        if value > most:
            raise ValueError(f"is {value}, more than max_new_tokens ({most}); lower it or raise max_new_tokens")
        return value

    @field_validator("top_p", "top_k")
    @classmethod
    def _whole_vocabulary(cls, value: float, info: Any) -> float:
        if (info.field_name == "top_p" and value < 1) or (info.field_name == "top_k" and value > 0):
            off = {"top_p": 1, "top_k": 0}[info.field_name]
            raise ValueError(
                f"training on truncated samples is biased, since the policy is scored over the whole vocabulary; "
                f"set it to {off}"
            )
        return value


class SupervisedConfig(Section):
    """Given texts that are imitated beside what the algorithm does: their gradient joins each optimizer step.

    Attributes:
        data: the texts, in its column ``completion``.
        weight: of their mean negative log-likelihood per token, beside the algorithm's loss: a number, or a schedule
            over the run's steps.
        texts_per_step, tokens_per_step: how many of them join an optimizer step.
        warmup_steps: so many steps at first imitate and do nothing else; the reference begins after them.
    """

    data: DataConfig
    weight: Planned = 1.0
    texts_per_step: Count = 4
    tokens_per_step: Count | None = None
    warmup_steps: Whole = 0

    @field_validator("data")
    @classmethod
    def _data(cls, value: DataConfig) -> DataConfig:
        if value.completion is None:
            raise ValueError("these are whole texts; name their column by completion")
        return value

    @field_validator("weight")
    @classmethod
    def _weight(cls, value: Any) -> Any:
        if least(value) < 0:
            raise ValueError("must be 0 or more at every step: a likelihood with a negative weight has no bound")
        return value


class EvaluateConfig(Section):
    """Held-out prompts and the rewards that only judge them; held-out ``texts``, of which the policy's perplexity and
    accuracy are measured. ``every``: steps between evaluations."""

    prompts: DataConfig | None = None
    texts: DataConfig | None = None
    every: Count | None = None
    texts_per_prompt: Count = 1
    held_out: list[RewardConfig] = []

    @field_validator("prompts")
    @classmethod
    def _prompts(cls, value: DataConfig | None) -> DataConfig | None:
        if value is not None and value.given:
            raise ValueError("texts are sampled for these prompts; leave out rollouts, completion and logged")
        return value

    @field_validator("texts")
    @classmethod
    def _texts(cls, value: DataConfig | None) -> DataConfig | None:
        if value is not None and value.completion is None:
            raise ValueError("these are whole texts; name their column by completion")
        return value


class Config(Section):
    """Everything that fixes a run. ``out`` is the run folder."""

    model: ModelConfig = ModelConfig()
    data: DataConfig
    rewards: list[RewardConfig] = []
    algorithm: AlgorithmConfig = AlgorithmConfig()
    sampling: SamplingConfig = SamplingConfig()
    train: TrainConfig = TrainConfig()
    supervised: SupervisedConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    seed: Whole = 0
    out: Text = "runs/first"

    @field_validator("rewards")
    @classmethod
    def _names(cls, value: list[RewardConfig]) -> list[RewardConfig]:
        if value and not any(reward.train for reward in value):
            raise ValueError("every one has train: false, so there is nothing to learn from; leave one without it")
        labels = [reward.label for reward in value]
        for index, label in enumerate(labels):
            first = labels.index(label)
            if first < index:
                text = f"{label!r} is also what rewards.{first} is called; give one of them another name"
                raise _below(f".{index}.name", text)
        return value

    @field_validator("data")
    @classmethod
    def _own_texts(cls, value: DataConfig, info: Any) -> DataConfig:
        model = info.data.get("model")
        if model is not None and model.scratch is not None and value.rollouts is not None:
            raise ValueError("rollouts are tokens of another model, which new weights cannot read; give texts instead")
        return value

    @field_validator("train")
    @classmethod
    def _group(cls, value: TrainConfig, info: Any) -> TrainConfig:
        algorithm, data = info.data.get("algorithm"), info.data.get("data")
        if not algorithm or not data or data.given:  # the sizes of given groups are the file's
            return value
        if preset_of(algorithm).groups and value.group_size < 2:
            text = f"must be at least 2 for {algorithm.name} as it is set here, which compares the texts of one prompt"
            raise _below(".group_size", text)
        if algorithm.keep > value.group_size:
            text = f"is {value.group_size}, and algorithm.keep would keep {algorithm.keep} of them; lower keep"
            raise _below(".group_size", text)
        texts = value.prompts_per_step * value.group_size
        if algorithm.minibatches > texts:
            text = f"times group_size is {texts} texts, too few for algorithm.minibatches={algorithm.minibatches}"
            raise _below(".prompts_per_step", text)
        for key in ("epochs", "tokens_per_step"):
            if getattr(value, key) is not None:
                raise _below(f".{key}", "is about given texts, and here texts are sampled; leave it out")
        return value

    @field_validator("supervised")
    @classmethod
    def _beside(cls, value: SupervisedConfig | None, info: Any) -> SupervisedConfig | None:
        algorithm = info.data.get("algorithm")
        if value is not None and algorithm is not None and preset_of(algorithm).loss == "likelihood":
            raise ValueError("likelihood learns from given texts already; give all of them in data")
        return value

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), supervised: bool = False) -> Config:
        """The config in a YAML file, changed by overrides such as ``train.steps=40`` or ``rewards.0.weight=2``.

        Args:
            supervised: with the defaults of supervised training (``as_supervised``).

        Raises:
            UserError: the file cannot be read, or all that is wrong in it, one line each with its dotted path.
        """
        values = _expanded(read_mapping(Path(path)))
        problems = apply_overrides(values, overrides, SHORT)
        values = as_supervised(values) if supervised else values
        algorithm = values.get("algorithm")
        without = isinstance(algorithm, dict) and (algorithm.get("teacher") or algorithm.get("name") == "likelihood")
        logged = isinstance(values.get("data"), dict) and values["data"].get("logged") is not None
        if not values.get("rewards") and not without and not logged:
            problems.append("rewards: there is none; name at least one function to learn from")
        return cls.build(values, str(path), problems)

    @classmethod
    def build(cls, values: Mapping[str, Any], where: str = "the config", problems: Sequence[str] = ()) -> Config:
        """The config of plain values; ``where`` names them in errors, ``problems`` are reported beside its own.

        Raises:
            UserError: all that is wrong, one line each with its dotted path.
        """
        problems = list(problems)
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            raise report(where, problems + sentences(error, cls)) from None
        if problems:
            raise report(where, problems)
        return config

    def dump(self) -> str:
        """The whole config as YAML text, defaults included; ``Config.load`` reads it back as it was."""
        return to_yaml(self.model_dump(mode="json"))


def as_supervised(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's plain values with the defaults of supervised training.

    They are the algorithm "likelihood", and texts in the column "text" that stand behind no prompt.
    """
    found = _expanded(dict(values))
    evaluate = found.get("evaluate")
    if isinstance(evaluate, dict):
        evaluate = found["evaluate"] = dict(evaluate)
    for section, key in ((found, "data"), (evaluate, "texts")):
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = {"path": section[key]}
        if isinstance(section, dict) and isinstance(section.get(key), dict) and "rollouts" not in section[key]:
            section[key] = {"column": None, "completion": "text", **section[key]}
    algorithm = found.get("algorithm", {})
    found["algorithm"] = {"name": "likelihood", **algorithm} if isinstance(algorithm, dict) else algorithm
    return found


# Sections that one word may stand for, and what it then names.
SHORT = {
    "model": "name",
    "data": "path",
    "algorithm": "name",
    "algorithm.critic": "model",
    "algorithm.importance": "level",
    "algorithm.teacher": "model",
    "algorithm.by_error": "first",
    "evaluate.prompts": "path",
    "evaluate.texts": "path",
    "supervised.data": "path",
}


def _expanded(values: dict[str, Any]) -> dict[str, Any]:
    """Sections given by one word, as mappings, so that overrides can reach into them."""
    for name in ("model", "data", "algorithm"):
        if isinstance(values.get(name), str):
            values[name] = {SHORT[name]: values[name]}
    rewards = values.get("rewards")
    if isinstance(rewards, list):
        values["rewards"] = [{RewardConfig.short: item} if isinstance(item, str) else item for item in rewards]
    return values


def _below(path: str, text: str) -> PydanticCustomError:
    """A problem at a key inside the field that is being checked."""
    return PydanticCustomError("cross_check", "{text}", {"text": text, "below": path})


def _import_path(value: str) -> str:
    module, _, name = value.rpartition(":")
    if not module or not name:
        raise ValueError(f"must be written module:name or folder/file.py:name, not {value!r}")
    return value


def _are(given: list[str]) -> str:
    return f"are {' and '.join(given)}" if given else "is none"
