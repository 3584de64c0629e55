"""The engine of rewards that run a frozen model beside the text: each token passes through the model once.

``load`` gives a ``Frozen`` model. It reads growing sequences of its own tokens, many together, and keeps what it has
read of each (keys and values) in a ``Memory``: the next piece costs one pass over its own new tokens. Texts of one
prompt share what was read of the prompt. ``token_values`` makes rewards of it.

Where a text outgrows the model's context, every token is still read with at least half a context before it: the window
moves by halves, at places that do not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from instant_reward import models
from instant_reward.notice import without_bars
from instant_reward.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

Measure = Callable[["Tensor", "Tensor"], "Tensor"]  # outputs [n, D] and the ids that follow [n] -> [n] or [n, k]

_NUMBERS = 2**26  # how many outputs of the model (logits) are held at once
_REMEMBERED = 2**28  # how many keys and values one batch may have
_AT_ONCE = 1024  # how many tokens of one text are read at once
_LOOKS = 2**26  # how many pairs of a token and one that it may look at


@dataclass(eq=False)
class Memory:
    """What the model has read of one text, in the window that begins at its token ``first``.

    Attributes:
        base: the prompt's memory, which texts of one prompt share; ``shared`` of its tokens belong to this text too.
        ids: the tokens that were read in this window, the shared ones included.
        store: keys and values of the others, ``[layers, 2, heads, room, size]``.
    """

    base: Memory | None = None
    base_ids: list[int] = field(default_factory=list)
    first: int = 0
    ids: list[int] = field(default_factory=list)
    shared: int = 0
    store: Tensor | None = None

    def keep(self, count: int) -> None:
        """Forgets all tokens but the first ``count``."""
        del self.ids[count:]
        self.shared = min(self.shared, count)

    def borrow(self, ids: Sequence[int]) -> None:
        """Begins with the tokens that the base has read and ``ids`` begin with."""
        if self.base is not None and not self.ids:
            self.shared = common(self.base.ids, ids)
            self.ids = self.base.ids[: self.shared]

    def example(self) -> Tensor | None:
        """Some of its keys and values, to see their shape; None where nothing was read."""
        if self.store is None and self.base is not None and self.shared:
            return self.base.store
        return self.store

    def copy_into(self, target: Tensor) -> None:
        """Writes all keys and values into ``[layers, 2, heads, at least len(ids), size]``."""
        own = len(self.ids) - self.shared
        if self.shared:
            assert self.base is not None
            assert self.base.store is not None
            target[..., : self.shared, :] = self.base.store[..., : self.shared, :]
        if own:
            assert self.store is not None
            target[..., self.shared : self.shared + own, :] = self.store[..., :own, :]

    def append(self, new: Tensor, ids: Sequence[int]) -> None:
        """Keys and values ``[layers, 2, heads, len(ids), size]`` of the tokens that follow."""
        held = len(self.ids) - self.shared
        needed = held + len(ids)
        if self.store is None or self.store.shape[3] < needed:
            room = max(needed, 2 * held)
            bigger = new.new_empty((*new.shape[:3], room, new.shape[4]))
            if self.store is not None:
                bigger[..., :held, :] = self.store[..., :held, :]
            self.store = bigger
        self.store[..., held:needed, :] = new
        self.ids.extend(ids)


@dataclass
class Job:
    """The model's outputs after the tokens ``[start, end)`` of ``ids`` are wanted; each has read all before it."""

    memory: Memory
    ids: list[int]
    start: int
    end: int


@dataclass
class _Part:
    """A job, or a stretch of it, inside one window: positions count from the window's first token."""

    number: int
    memory: Memory
    ids: list[int]
    start: int


class Frozen:
    """A frozen model and its tokenizer.

    Attributes:
        causal: whether it reads from left to right, so that outputs do not change with what follows.
        reuses: whether it goes on from what it has read; else (sliding windows, recurrent layers) each piece reads its
            text again, with the same values.
        context: the most tokens that it reads at once.
        tokens_read: how many tokens have passed through it, padding not counted.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.trunk = getattr(model, model.base_model_prefix)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        config = model.config.get_text_config()
        limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
        self.context = max(2, min([int(limit) for limit in limits if limit and limit < 1e9], default=2**30))
        self._width: int = config.hidden_size
        self._vocabulary: int = config.vocab_size
        self.tokens_read = 0
        self._bases: WeakValueDictionary[tuple[int, ...], Memory] = WeakValueDictionary()
        self._step = 0  # keys and values per token; known when some have been read
        self.reuses = True
        self.causal, self.reuses = self._probe()
        self.tokens_read = 0

    def memory(self, prompt: Sequence[int] = ()) -> Memory:
        """The memory of a new text; texts with the same ``prompt`` in memory at one time share what was read of it."""
        if not self.reuses or not prompt or len(prompt) > self.context:
            return Memory()
        key = tuple(prompt)
        base = self._bases.get(key)
        if base is None:
            self._bases[key] = base = Memory(base_ids=list(prompt))
        return Memory(base=base)

    def read(self, jobs: Sequence[Job], measure: Measure, logits: bool) -> list[Tensor]:
        """Reads all jobs together, each token that a memory holds already left out.

        Args:
            measure: makes numbers of the outputs after some tokens of one text, ``[n, D]``, and of the ids of the
                tokens that follow each (0 where none does).
            logits: whether the outputs are the model's logits, or the last hidden states.

        Returns:
            ``measure``'s numbers for each job, on the processor.
        """
        import torch

        found: list[list[Tensor]] = [[] for _ in jobs]
        done = [job.start for job in jobs]
        width = self._vocabulary if logits else 16 * self._width
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            self._read_bases(jobs)
            while parts := [self._part(i, job, done[i], width) for i, job in enumerate(jobs) if done[i] < job.end]:
                if self.reuses:
                    self._feed_all([(p.memory, p.ids[len(p.memory.ids) : p.start]) for p in parts], 16 * self._width)
                for together in self._batches([(len(part.ids), self._new(part)) for part in parts], width):
                    batch = [parts[i] for i in together]
                    for part, outputs in zip(batch, self._outputs(batch, logits), strict=True):
                        job, count = jobs[part.number], len(outputs)
                        following = [*job.ids[done[part.number] + 1 : done[part.number] + 1 + count], 0][:count]
                        found[part.number].append(measure(outputs, torch.tensor(following, device=self.device)))
                        done[part.number] += count
        return [torch.cat(some).cpu() if some else torch.zeros(0) for some in found]

    def _new(self, part: _Part) -> int:
        return len(part.ids) - part.start if self.reuses else len(part.ids)

    def _part(self, number: int, job: Job, start: int, width: int) -> _Part:
        half = self.context // 2
        first = 0 if start < self.context else (1 + (start - self.context) // half) * half
        end = min(job.end, first + self.context)
        if self.reuses:
            end = min(end, start + min(_AT_ONCE, max(1, _NUMBERS // width)))
        ids, memory = job.ids[first:end], job.memory
        if memory.first != first:
            memory.keep(0)
            memory.first, memory.base = first, None
        memory.borrow(ids)
        memory.keep(min(common(memory.ids, ids), start - first))
        return _Part(number, memory, ids, start - first)

    def _read_bases(self, jobs: Sequence[Job]) -> None:
        """Prompts that no text has gone on from yet."""
        begun = [job.memory.base for job in jobs if job.start < min(job.end, self.context)]
        bases = {id(base): base for base in begun if base is not None}
        unread = [(base, base.base_ids[len(base.ids) :]) for base in bases.values()]
        self._feed_all(unread, 16 * self._width)

    def _feed_all(self, rows: Sequence[tuple[Memory, list[int]]], width: int) -> None:
        """Reads on without any output."""
        while rows := [(memory, ids) for memory, ids in rows if ids]:
            now = [(memory, ids[:_AT_ONCE]) for memory, ids in rows]
            for together in self._batches([(len(memory.ids) + len(ids), len(ids)) for memory, ids in now], width):
                self._feed([now[i] for i in together], logits=False)
            rows = [(memory, ids[_AT_ONCE:]) for memory, ids in rows]

    def _batches(self, sizes: Sequence[tuple[int, int]], width: int) -> Iterator[list[int]]:
        """Rows that are read together, of about the same number of new tokens; ``sizes`` are (all tokens, new ones)."""
        batch: list[int] = []
        most = longest = 0
        for i in sorted(range(len(sizes)), key=lambda i: sizes[i][1], reverse=True):
            most, longest = most or sizes[i][1], max(longest, sizes[i][0])
            rows = len(batch) + 1
            too_many = rows * most * width > _NUMBERS or rows * most * longest > _LOOKS
            if batch and (too_many or rows * longest * self._step > _REMEMBERED):
                yield batch
                batch, (longest, most) = [], sizes[i]
            batch.append(i)
        if batch:
            yield batch

    def _outputs(self, parts: Sequence[_Part], logits: bool) -> list[Tensor]:
        """``[n, D]`` for each part: after its tokens from ``start`` on."""
        if self.reuses:
            rows = [(part.memory, part.ids[part.start :]) for part in parts]
            outputs = self._feed(rows, logits)
            return [row[: len(ids)] for row, (_, ids) in zip(outputs, rows, strict=True)]
        outputs = self._whole([part.ids for part in parts], logits)
        return [row[part.start : len(part.ids)] for row, part in zip(outputs, parts, strict=True)]

    def _feed(self, rows: Sequence[tuple[Memory, list[int]]], logits: bool) -> Tensor:
        """Each memory's next tokens; the outputs after them, ``[rows, most new tokens, D]``, padded on the right."""
        import torch

        past = torch.tensor([len(memory.ids) for memory, _ in rows])
        ids, count = self._padded([ids for _, ids in rows])
        before, new = int(past.max()), ids.shape[1]
        known = torch.arange(before)[None, None] < past[:, None, None]
        look = torch.cat([known.expand(-1, new, -1), torch.ones(new, new).tril().bool().expand(len(rows), -1, -1)], 2)
        mask = torch.zeros(look.shape, dtype=self.dtype).masked_fill(~look, torch.finfo(self.dtype).min)
        positions = (past[:, None] + torch.arange(new)).clamp(max=self.context - 1)
        stored = _joined_cache()([memory for memory, _ in rows], before, new)
        out = (self.model if logits else self.trunk)(
            input_ids=ids.to(self.device),
            attention_mask=mask[:, None].to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=stored,
            use_cache=True,
        )
        fresh = stored.fresh()
        self._step = fresh[:, :, 0, :, 0].numel()
        for row, (memory, added) in enumerate(rows):
            memory.append(fresh[:, :, row, :, : len(added)], added)
        self.tokens_read += sum(count)
        outputs: Tensor = out.logits if logits else out.last_hidden_state
        return outputs

    def _whole(self, rows: Sequence[list[int]], logits: bool) -> Tensor:
        """The same for models that cannot go on: every row from its first token."""
        import torch

        ids, count = self._padded(rows)
        mask = (torch.arange(ids.shape[1])[None] < torch.tensor(count)[:, None]).long()
        options = {"use_cache": False} if logits or self.causal else {}
        out = (self.model if logits else self.trunk)(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **options
        )
        self.tokens_read += sum(count)
        outputs: Tensor = out.logits if logits else out.last_hidden_state
        return outputs

    @staticmethod
    def _padded(rows: Sequence[list[int]]) -> tuple[Tensor, list[int]]:
        import torch

        count = [len(ids) for ids in rows]
        return torch.tensor([ids + [0] * (max(count) - len(ids)) for ids in rows]), count

    def _probe(self) -> tuple[bool, bool]:
        """Whether it reads from left to right, and whether going on from what was read gives what one pass gives."""
        import torch
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        ids = [1 + i for i in range(min(6, self._vocabulary - 1))]
        self.causal = False
        with torch.no_grad():
            short, long = self._whole([ids[:2]], logits=False)[0], self._whole([ids], logits=False)[0]
            error = 0.05 if self.dtype in (torch.bfloat16, torch.float16) else 1e-3
            size = float(long.abs().max())
            causal = bool((short - long[:2]).abs().max() <= error * size)
            if not causal:
                return False, False
            try:
                plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.model.config).layers)
                memory = Memory()
                self._feed([(memory, ids[:2])], logits=False)
                rest = self._feed([(memory, ids[2:]), (Memory(), ids[:1])], logits=False)
                return True, plain and bool((rest[0] - long[2:]).abs().max() <= error * size)
            except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError, NotImplementedError):
                return True, False  # layers that remember something else than keys and values of one shape


@cache
def _joined_cache() -> Any:
    """A class, made when first needed: it comes from transformers."""
    import torch
    from transformers import Cache

    class Joined(Cache):
        """The keys and values of several memories side by side, with room for the new ones behind the longest."""

        def __init__(self, memories: Sequence[Memory], before: int, new: int) -> None:
            super().__init__(layers=[])
            self.before = before
            self.store: Tensor | None = None
            self.layers_read: list[Tensor] = []
            known = next((found for m in memories if (found := m.example()) is not None), None)
            if known is not None:
                layers, two, heads, _, size = known.shape
                self.store = known.new_zeros((layers, two, len(memories), heads, before + new, size))
                for row, memory in enumerate(memories):
                    memory.copy_into(self.store[:, :, row])

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            if self.store is None:
                self.layers_read.append(torch.stack([key_states, value_states]))
                return key_states, value_states
            self.store[layer_idx, 0, :, :, self.before :] = key_states
            self.store[layer_idx, 1, :, :, self.before :] = value_states
            return self.store[layer_idx, 0], self.store[layer_idx, 1]

        def fresh(self) -> Tensor:
            """The new keys and values, ``[layers, 2, rows, heads, new, size]``."""
            if self.store is None:
                return torch.stack(self.layers_read)
            return self.store[..., self.before :, :]

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.before

    return Joined


_LOADED: WeakValueDictionary[tuple[Any, ...], Frozen] = WeakValueDictionary()


def load(name: str, dtype: str, device: str | None, kind: str = "CausalLM") -> Frozen:
    """A frozen model, as rewards of one process share it.

    Args:
        name: a short name, a folder, a GGUF file or a hub id.
        dtype: "float32", "bfloat16" or "float64".
        device: "cpu", "cuda", ...; without it a GPU where there is one.
        kind: which of transformers' ``AutoModelFor...`` reads it.

    Raises:
        UserError: the model is not there, cannot be read, or lacks trained weights for this use.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype not in known:
        raise UserError(f"dtype={dtype!r} is unknown; use one of {', '.join(known)}")
    folder = models.locate(name)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    key = (str(folder.resolve()), (folder / "config.json").stat().st_mtime_ns, dtype, place, kind)
    if (found := _LOADED.get(key)) is not None:
        return found
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        with without_bars():
            model, report = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
                folder, dtype=known[dtype], output_loading_info=True
            )
        model = model.to(place).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the model in {folder} cannot be loaded: {reason}; check the folder") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        made = ", ".join(model.config.architectures or ["unknown"])
        raise UserError(
            f"the model {name} (made as {made}) has no trained weights {missing}, which {type(model).__name__} needs; "
            "use a model that was trained for this"
        )
    frozen = Frozen(model, tokenizer, name)
    _LOADED[key] = frozen
    return frozen


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer alone. UserError where it is not there."""
    from transformers import AutoTokenizer

    folder = models.locate(name)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {reason}; check the folder") from error


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    count = min(len(one), len(other))
    if one[:count] == other[:count]:
        return count
    return next(i for i in range(count) if one[i] != other[i])


def exact(numbers: Tensor) -> Tensor:
    """In float32, where they are less exact."""
    import torch

    return numbers if numbers.dtype == torch.float64 else numbers.float()
