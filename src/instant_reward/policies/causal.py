"""A causal language model as a policy: log-probabilities with gradient, sampling, optimizer steps, saving."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from instant_reward import models
from instant_reward.batch import Batch
from instant_reward.credit import Marks
from instant_reward.data import to_prompts
from instant_reward.policies.head import Softmax, token_logprobs
from instant_reward.policies.layout import lay_out
from instant_reward.policies.optimizer import Optimization, Stepper
from instant_reward.types import Message, PolicyOutput, Rollout, UserError

Dtype = Literal["auto", "float32", "bfloat16", "float64"]


class CausalPolicy:
    """A causal language model that can be sampled from and trained.

    Args:
        model: a transformers causal model; its weights are the master weights.
        tokenizer: its tokenizer.
        compute: the dtype the matrix products run in; "bfloat16" keeps float32 master weights under autocast.
        adapter: the peft wrapper around ``model`` where only an adapter is trained.
    """

    def __init__(
        self, model: Any, tokenizer: Any, compute: torch.dtype = torch.float32, adapter: Any = None, name: str = ""
    ) -> None:
        self.model = model.eval()  # dropout would make the trainer's log-probabilities differ from the sampler's
        self.tokenizer = tokenizer
        self.compute = compute
        self.adapter = adapter
        self.name = name
        self.reference: Any = None
        self.compares = False
        self.stepper: Stepper | None = None
        self.end_ids = _end_ids(model, tokenizer)
        self.pad_id = int(next(i for i in (tokenizer.pad_token_id, *self.end_ids, 0) if i is not None))
        _check_head(model)
        _check_attention(model)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def context(self) -> int:
        """How many tokens the model can read at once; where its attention slides, what one window holds."""
        config = self.model.config
        slides = getattr(config, "use_sliding_window", True)
        limits = [config.sliding_window] if slides and getattr(config, "sliding_window", None) else []
        limits += [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
        return min((int(limit) for limit in limits if limit), default=2**31)

    def sample(
        self,
        prompts: Sequence[str | list[Message] | Mapping[str, Any]],
        per_prompt: int = 1,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        top_p: float = 1.0,
        rewards: Sequence[Any] = (),
        seed: int = 0,
        *,
        top_k: int = 0,
        min_new_tokens: int = 0,
        stop: Sequence[str] = (),
        rows: int = 64,
    ) -> list[Rollout]:
        """Samples texts and scores them while they are written.

        Args:
            prompts: a string is continued as it stands, a list of messages goes through the chat template, a mapping
                has its prompt under "prompt" and other columns beside it.
            per_prompt: siblings of each prompt; they share ``group``.
            temperature: 0 takes the likeliest token.
            rewards: what scores the texts.
            seed: the same seed draws the same texts.
            rows: texts decoded side by side.

        Returns:
            ``len(prompts) * per_prompt`` rollouts, siblings next to each other.

        Raises:
            UserError: where a prompt is empty or too long, or a setting is out of range.
            RewardError: where a reward fails.
        """
        from instant_reward.sampling.draw import Settings
        from instant_reward.sampling.engine import Engine, in_order

        if isinstance(prompts, str | Mapping):
            raise UserError(f"sample: prompts must be a list, not one {type(prompts).__name__}; wrap it in [ ]")
        settings = Settings(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            rows=rows,
        )
        table = [dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt} for prompt in prompts]
        limit = self.context - max_new_tokens
        ready = to_prompts(table, self.tokenizer, column="prompt", max_tokens=limit)
        engine = Engine(self, settings)
        return in_order(engine.stream(ready, per_prompt, rewards=rewards, seed=seed))

    def __call__(self, batch: Batch) -> PolicyOutput:
        """Log-probabilities and entropies of the sampled tokens, ``[B, L]``, as the sampler drew them."""
        return self._read(self.model, batch)

    def logprobs(self, token_ids: Any, mask: Any, length: Any = None, temperature: float = 1.0) -> Tensor:
        """``log p(x_t | x_<t)`` of the tokens under the mask.

        Args:
            token_ids: int ``[B, L]``, right-padded.
            mask: bool or 0/1 ``[B, L]``; off at each row's first token, which nothing precedes.
            length: ``[B]``, the rows' lengths; without it, rows end with their last masked token.
            temperature: the logits are divided by it.

        Returns:
            ``[B, L]`` with gradient; 0 where the mask is off.
        """
        ids, on = torch.as_tensor(token_ids).cpu().long(), torch.as_tensor(mask).cpu().bool()
        if not 0.0 < temperature < math.inf:
            raise UserError(f"logprobs: temperature={temperature!r} must be above 0")
        if ids.dim() != 2 or ids.shape != on.shape:
            raise UserError(f"logprobs: token_ids {tuple(ids.shape)} and mask {tuple(on.shape)} must both be [B, L]")
        if bool(on[:, 0].any()):
            raise UserError(
                "logprobs: the mask is on at a row's first token, which nothing precedes; switch it off there"
            )
        last = torch.arange(1, ids.shape[1] + 1).expand_as(ids)
        ends = torch.where(on, last, torch.ones_like(last)).amax(1)
        lengths = ends if length is None else torch.as_tensor(length).cpu().long()
        if bool((lengths < ends).any()):
            raise UserError("logprobs: the mask is on beyond a row's length; shorten the mask or correct the length")
        return self(_bare_batch(ids, on, lengths, temperature)).logprobs

    def score(self, batch: Batch, tokens_per_part: int = 2048) -> Tensor:
        """Log-probabilities of the sampled tokens, ``[B, L]``, without gradient and in parts that fit in memory."""
        return self._score(self.model, batch, tokens_per_part)

    def annotate(self, batch: Batch, tokens_per_part: int = 2048) -> Batch:
        """Adds the reference's log-probabilities ``[B, L]`` where a reference was asked for. No gradient."""
        if not self.compares:
            return batch
        with self._as_reference() as model:
            return replace(batch, ref_logprobs=self._score(model, batch, tokens_per_part))

    def _score(self, model: Any, batch: Batch, tokens_per_part: int) -> Tensor:
        filled = torch.zeros_like(batch.old_logprobs)
        with torch.no_grad():
            for rows in batch.shares(tokens_per_part):
                values = self._read(model, batch.select(rows)).logprobs
                filled[rows, : values.shape[1]] = values.to(filled.dtype)
        return filled

    def prepare(self, settings: Optimization, reference: bool) -> None:
        """Makes the optimizer and, where one is asked for, a frozen copy of the policy as it is now."""
        self.stepper = Stepper(self.model.parameters(), settings)
        self.compares = reference
        if reference and self.adapter is None:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)

    def backward(self, loss: Tensor) -> None:
        """Adds a part's gradient to the step's."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> dict[str, float]:
        """One optimizer step from the gathered gradients; returns its gradient norm and learning rate."""
        assert self.stepper is not None, "prepare the policy before it steps"
        rate = self.stepper.learning_rate
        return {"grad_norm": self.stepper.step(), "learning_rate": rate}

    def save(self, folder: str | Path) -> Path:
        """Writes what transformers' ``from_pretrained`` loads, tokenizer included; an adapter is merged in."""
        target = Path(folder)
        model = self.model
        if self.adapter is not None:
            model = copy.deepcopy(self.adapter).merge_and_unload()
        model.save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        return target

    def save_state(self, folder: Path) -> None:
        """Writes weights, optimizer and schedule for a checkpoint."""
        from safetensors.torch import save_file

        if self.adapter is None:
            self.save(folder / "policy")
        else:
            save_file({k: v.detach().contiguous() for k, v in self._trained()}, folder / "adapter.safetensors")
        assert self.stepper is not None, "prepare the policy before it is saved in a checkpoint"
        torch.save(self.stepper.state_dict(), folder / "optimizer.pt")

    def load_weights(self, folder: Path) -> None:
        """Takes the weights of a checkpoint."""
        from safetensors.torch import load_file

        where = "adapter.safetensors" if self.adapter is not None else "policy/model.safetensors"
        stored = load_file(folder / where)
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(stored[name])

    def load_state(self, folder: Path) -> None:
        """Goes on from a checkpoint, bit for bit."""
        assert self.stepper is not None, "prepare the policy before it is loaded from a checkpoint"
        self.load_weights(folder)
        self.stepper.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    @contextmanager
    def _as_reference(self) -> Iterator[Any]:
        """The model as it was before training: the frozen copy, or the adapter switched off."""
        if self.adapter is None:
            yield self.reference
        else:
            with self.adapter.disable_adapter():
                yield self.model

    def _read(self, model: Any, batch: Batch) -> PolicyOutput:
        layout, device = lay_out(batch), self.device
        attention = None if layout.attention_mask is None else layout.attention_mask.to(device)
        with self._autocast():
            states = trunk(model)(
                input_ids=layout.input_ids.to(device),
                position_ids=layout.position_ids.to(device),
                attention_mask=attention,
                use_cache=False,
            ).last_hidden_state
        on = batch.mask.bool()
        hidden = states[layout.rows.to(device), layout.columns.to(device)]
        if self.compute == torch.bfloat16:
            hidden = hidden.to(torch.bfloat16)
        head = model.get_output_embeddings()
        softmax = Softmax(batch.temperature, self.end_ids if bool(batch.no_end.any()) else ())
        targets, no_end = batch.token_ids[on].to(device), batch.no_end[on].to(device)
        values, entropies = token_logprobs(hidden, head.weight, getattr(head, "bias", None), targets, no_end, softmax)
        home = on.device
        logprobs = torch.zeros(on.shape, dtype=values.dtype, device=home).masked_scatter(on, values.to(home))
        entropy = torch.zeros(on.shape, dtype=values.dtype, device=home).masked_scatter(on, entropies.to(home))
        return PolicyOutput(logprobs, entropy)

    def _autocast(self) -> Any:
        if self.compute == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def load_policy(
    name: str, dtype: Dtype = "float32", *, lora: Mapping[str, Any] | None = None, device: str | None = None
) -> CausalPolicy:
    """Loads a causal language model and its tokenizer.

    Args:
        name: a short name ("smollm2-135m"), a local folder, a GGUF file, or a hub id.
        dtype: "float32", "bfloat16" (its matrix products; the weights stay float32), "float64", or "auto": bfloat16
            where the machine multiplies it fast, float32 elsewhere.
        lora: train an adapter of low rank instead of all weights: ``{"rank": 16, "alpha": 32, ...}``.
        device: "cpu", "cuda", ...; without it a GPU where there is one.

    Raises:
        UserError: where the model is not there or cannot be read.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.locate(name)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    compute = _compute_dtype(dtype, place)
    master = torch.float64 if compute == torch.float64 else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=master, attn_implementation="sdpa")
        model = model.to(place)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the model in {folder} cannot be loaded: {_first_line(error)}; check the folder") from error
    adapter = None
    if lora is not None:
        adapter = _with_lora(model, **lora)
        model = adapter.base_model.model
    return CausalPolicy(model, tokenizer, compute, adapter, name)


def trunk(model: Any) -> Any:
    """The model without its output head."""
    return getattr(model, model.base_model_prefix)


def _with_lora(
    model: Any,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
) -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError("model.lora needs the package peft; run: pip install 'instant-reward[lora]'") from error
    if dropout:
        raise UserError(
            "model.lora.dropout must be 0: dropout makes the trainer's log-probabilities differ from the sampler's"
        )
    scale: Any = alpha  # peft says that it must be an integer, and takes any number
    settings = peft.LoraConfig(
        r=rank, lora_alpha=scale, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, settings)


def _compute_dtype(dtype: Dtype, place: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype in known:
        return known[dtype]
    if dtype != "auto":
        raise UserError(f"dtype={dtype!r} is unknown; use one of auto, {', '.join(known)}")
    if place.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # Without such instructions a processor emulates bfloat16, many times slower than float32.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    found: list[int] = []
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(sorted(set(found)))


def _check_attention(model: Any) -> None:
    """Both the sampler and the shared layout say by a mask of their own what each token may look at."""
    kind = model.config._attn_implementation
    if kind != "sdpa":
        raise UserError(
            f"{type(model).__name__} runs the attention {kind!r}, and only 'sdpa' is supported; load it with "
            "attn_implementation='sdpa', or use another model"
        )


def _check_head(model: Any) -> None:
    """The log-probabilities are computed from the head's weight: a model that does more to its logits is refused."""
    head = model.get_output_embeddings()
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        states = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state
        plain = torch.nn.functional.linear(states, head.weight, getattr(head, "bias", None))
    # A cap does next to nothing to the small logits of a young model, hence the look at the config.
    capped = getattr(model.config, "final_logit_softcapping", None)
    if capped or not torch.allclose(whole, plain, atol=1e-3, rtol=1e-3):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head (scaling or capping), which is not "
            "supported; use another model"
        )


def _bare_batch(ids: Tensor, on: Tensor, lengths: Tensor, temperature: float) -> Batch:
    rows = ids.shape[0]
    none = torch.zeros(0, dtype=torch.long)
    return Batch(
        token_ids=ids,
        mask=on,
        versions=torch.zeros_like(ids),
        old_logprobs=torch.zeros(ids.shape),
        no_end=torch.zeros_like(on),
        length=lengths,
        prompt_length=torch.ones(rows, dtype=torch.long),
        group=torch.arange(rows),
        cut_off=torch.zeros(rows, dtype=torch.bool),
        sources=[],
        marks=Marks(none, none, none, none, none, torch.zeros(0)),
        temperature=temperature,
        text_count=rows,
        token_count=int(on.sum()),
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
