"""A causal language model as a policy: log-probabilities with gradient, sampling, optimizer steps, saving."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instant_reward.batch import Batch
from instant_reward.credit import Marks
from instant_reward.data import to_prompts
from instant_reward.notice import without_bars
from instant_reward.policies import terms
from instant_reward.policies.annotate import annotated, ask, beyond_the_end
from instant_reward.policies.critic import Critic
from instant_reward.policies.head import Softmax, token_logprobs
from instant_reward.policies.load import (
    Dtype,
    check_attention,
    check_head,
    compute_dtype,
    end_ids,
    load_beside,
    load_model,
    with_lora,
)
from instant_reward.policies.memory import keep_freed_memory
from instant_reward.policies.optimizer import Group, Optimization, Stepper
from instant_reward.policies.states import States, on_tokens, trunk
from instant_reward.types import CriticNeed, Message, Needs, PolicyOutput, Rollout, UserError

CRITIC, REFERENCE = "critic.safetensors", "reference.safetensors"


class CausalPolicy:
    """A causal language model that can be sampled from and trained.

    On a processor it has the C library keep freed memory, for the whole process (``keep_freed_memory``).

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
        self.needs = Needs()
        self.states = States(compute)
        self.reference: Any = None
        self.reference_moved: dict[str, Tensor] = {}
        self.teacher: Any = None
        self.critic: Critic | None = None
        self.stepper: Stepper | None = None
        self.end_ids = end_ids(model, tokenizer)
        self.pad_id = int(next(i for i in (tokenizer.pad_token_id, *self.end_ids, 0) if i is not None))
        check_head(model)
        check_attention(model)
        if self.device.type == "cpu":
            keep_freed_memory()

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
        guide: float = 0.0,
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
            guide: adds so many times the critic's Q - V to the logits, for a policy trained by "ilql".

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
            guide=guide,
        )
        table = [dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt} for prompt in prompts]
        limit = self.context - max_new_tokens
        ready = to_prompts(table, self.tokenizer, column="prompt", max_tokens=limit)
        engine = Engine(self, settings)
        return in_order(engine.stream(ready, per_prompt, rewards=rewards, seed=seed))

    def __call__(self, batch: Batch) -> PolicyOutput:
        """What the policy says of the sampled tokens, as the sampler drew them; more where ``prepare`` asked for it."""
        # A policy without a loss of its own needs no graph, unless the critic's gradient goes through its trunk.
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self.needs.learns or not self._detached())):
            head = self.head(self.model, batch)
            output = self.token_logprobs(head, batch)
        ask(self, output, head, batch)
        return output

    def _detached(self) -> bool:
        """Whether the critic sends no gradient into the policy's trunk."""
        return self.critic is None or self.critic.base is not None or self.critic.need.detach

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
        batch = _bare_batch(ids, on, lengths, temperature)
        return self.token_logprobs(self.head(self.model, batch), batch).logprobs

    def score(self, batch: Batch, tokens_per_part: int = 2048) -> Tensor:
        """Log-probabilities of the sampled tokens, ``[B, L]``, without gradient and in parts that fit in memory."""
        return self._score(self.model, batch, tokens_per_part)

    def annotate(self, batch: Batch, tokens_per_part: int = 2048) -> Batch:
        """Adds what ``prepare`` was asked for and the credit needs: ``Batch`` names it. No gradient."""
        if self.critic is not None:
            self.critic.begin(batch)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for rows in batch.shares(tokens_per_part):
                for name, values in annotated(self, batch.select(rows)).items():
                    if name not in found:
                        shape = [*values.shape[1:-1], batch.token_ids.shape[1]]
                        found[name] = torch.zeros(len(batch), *shape, dtype=batch.old_logprobs.dtype)
                    found[name][rows, ..., : values.shape[-1]] = values.to(found[name])
            if self.critic is not None:
                found["bootstrap"] = beyond_the_end(self, self.critic, batch, tokens_per_part)
        return replace(batch, **found) if found else batch  # type: ignore[arg-type]

    def _score(self, model: Any, batch: Batch, tokens_per_part: int) -> Tensor:
        filled = torch.zeros_like(batch.old_logprobs)
        with torch.no_grad():
            for rows in batch.shares(tokens_per_part):
                part = batch.select(rows)
                values = self.token_logprobs(self.head(model, part), part).logprobs
                filled[rows, : values.shape[1]] = values.to(filled.dtype)
        return filled

    def prepare(self, settings: Optimization, needs: Needs | None = None) -> None:
        """Makes the optimizer and what an algorithm needs besides: reference, critic, teacher."""
        self.needs = needs or Needs()
        self.critic = self.teacher = self.reference = None
        self.states = States(self.compute)  # which knows none of the models that are no more
        self.reference_moved = {}
        groups = [Group(list(self.model.parameters()), settings.learning_rate)]
        teacher = self.needs.teacher
        if teacher is not None and teacher.model is not None:
            self.teacher = load_beside(
                teacher.model, self.compute, str(self.device), self.tokenizer, "algorithm.teacher.model"
            )
            widths = [len(one.get_output_embeddings().weight) for one in (self.model, self.teacher)]
            if widths[0] != widths[1] and (teacher.whole or teacher.baseline):
                raise UserError(
                    f"algorithm.teacher.model: its output head has {widths[1]} rows and the policy's {widths[0]}, so "
                    "whole vocabularies cannot be compared; leave out teacher.whole and teacher.baseline"
                )
        if self.adapter is None and (self.needs.reference or (teacher is not None and teacher.model is None)):
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        if self.needs.critic is not None:
            self.critic = self._new_critic()
            rate = self.needs.critic.learning_rate or settings.learning_rate
            groups.append(Group(list(self.critic.parameters()), rate))
        self.stepper = Stepper(groups, settings)

    def _new_critic(self) -> Critic:
        need = self.needs.critic
        assert need is not None, "nobody asked for a critic"
        base = None
        if need.model == "copy":
            base = copy.deepcopy(trunk(self.model))
        elif need.model != "head":
            whole = load_beside(need.model, self.compute, str(self.device), self.tokenizer, "algorithm.critic.model")
            base = trunk(whole.requires_grad_(True))
        weight = self.model.get_output_embeddings().weight
        width = (base if base is not None else trunk(self.model)).config.hidden_size
        return Critic(need, base, width, weight.shape[0], weight.dtype, self.device)

    def reset_reference(self) -> None:
        """From here on the reference is the policy as it is now."""
        self._take_reference({name: parameter.detach().clone() for name, parameter in self._trained()})

    def _take_reference(self, weights: dict[str, Tensor]) -> None:
        self.reference_moved = {name: values.to(self.device) for name, values in weights.items()}
        if self.adapter is None:
            with torch.no_grad():
                for name, parameter in self.reference.named_parameters():
                    parameter.copy_(self.reference_moved.get(name, parameter))

    def backward(self, loss: Tensor) -> None:
        """Adds a part's gradient to the step's."""
        loss.backward()  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Drops the gradients that have gathered."""
        assert self.stepper is not None, "prepare the policy before it learns"
        self.stepper.optimizer.zero_grad(set_to_none=True)

    def step(self) -> dict[str, float]:
        """One optimizer step from the gathered gradients; returns its gradient norm and learning rate."""
        assert self.stepper is not None, "prepare the policy before it steps"
        rate = self.stepper.learning_rate
        norms = self.stepper.step()
        row = {"grad_norm": norms[0], "learning_rate": rate}
        if self.critic is not None:
            self.critic.follow()
            row["critic_grad_norm"] = norms[1]
        return row

    def save(self, folder: str | Path) -> Path:
        """Writes what transformers' ``from_pretrained`` loads, tokenizer included; an adapter is merged in."""
        target = Path(folder)
        model = self.model
        if self.adapter is not None:
            model = copy.deepcopy(self.adapter).merge_and_unload()
        with without_bars():
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
        if self.critic is not None:
            save_file({key: value.contiguous() for key, value in self.critic.state_dict().items()}, folder / CRITIC)
        if self.reference_moved:
            save_file({key: value.contiguous() for key, value in self.reference_moved.items()}, folder / REFERENCE)
        torch.save(self.stepper.state_dict(), folder / "optimizer.pt")

    def load_critic(self, folder: Path, need: CriticNeed) -> None:
        """Takes the critic of a checkpoint, for decoding that it guides."""
        from safetensors.torch import load_file

        self.needs = replace(self.needs, critic=need)
        self.critic = self._new_critic()
        self.critic.load_state_dict(load_file(folder / CRITIC))

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
        from safetensors.torch import load_file

        self.load_weights(folder)
        if self.critic is not None:
            self.critic.load_state_dict(load_file(folder / CRITIC))
        if (folder / REFERENCE).is_file():
            self._take_reference(load_file(folder / REFERENCE))
        self.stepper.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    @contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The model as it was: the frozen copy, or the adapter switched off, or as it was when last reset."""
        if self.adapter is None:
            yield self.reference
        elif self.reference_moved:
            with self._swapped(self.reference_moved):
                yield self.model
        else:
            with self.adapter.disable_adapter():
                yield self.model

    @contextmanager
    def as_teacher(self) -> Iterator[Any]:
        """The teacher: another model, or this one as it was."""
        if self.teacher is not None:
            yield self.teacher
        else:
            with self.as_reference() as model:
                yield model

    @contextmanager
    def _swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        now = {name: parameter.data for name, parameter in self._trained()}
        try:
            for name, parameter in self._trained():
                parameter.data = weights[name]
            yield
        finally:
            for name, parameter in self._trained():
                parameter.data = now[name]

    def head(self, model: Any, batch: Batch, read: Batch | None = None) -> terms.Head:
        """The states that predict the sampled tokens, and the head that makes logits of them.

        Args:
            model: this policy's, or another one for the same tokens.
            read: the same texts as the model reads them, where that is not ``batch``.
        """
        hidden = self.states.of_sampled(trunk(model), batch if read is None else read)
        head = model.get_output_embeddings()
        softmax = Softmax(batch.temperature, self.end_ids if bool(batch.no_end.any()) else ())
        no_end = batch.no_end[batch.mask.bool()].to(hidden.device)
        shadow = self.states.products.shadow(head.weight)
        return terms.Head(hidden, head.weight, getattr(head, "bias", None), no_end, softmax, shadow)

    @staticmethod
    def token_logprobs(head: terms.Head, batch: Batch) -> PolicyOutput:
        """Log-probabilities ``[B, L]`` of the sampled tokens with gradient, and entropies without."""
        targets = batch.token_ids[batch.mask.bool()].to(head.hidden.device)
        logprobs, entropies = token_logprobs(
            head.hidden, head.weight, head.bias, targets, head.no_end, head.softmax, head.shadow
        )
        return PolicyOutput(on_tokens(logprobs, batch.mask), on_tokens(entropies, batch.mask))


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
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    compute = compute_dtype(dtype, place)
    model, tokenizer = load_model(name, compute, place)
    adapter = None
    if lora is not None:
        adapter = with_lora(model, **lora)
        model = adapter.base_model.model
    return CausalPolicy(model, tokenizer, compute, adapter, name)


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
