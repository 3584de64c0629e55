"""A teacher for the policy's own texts: another model, or the policy as it was, which may read another prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from instant_reward.batch import Batch, collate
from instant_reward.types import Prompt, Rollout, UserError


def shown_to_teacher(rollouts: Sequence[Rollout], sees: str, tokenizer: Any, pad_id: int, context: int) -> Batch:
    """The same texts behind the prompts that the teacher reads; from the sources that it reads, where there are any.

    Args:
        sees: a template over ``{prompt}`` and the columns of the prompt's data.
        context: how many tokens the teacher can read.

    Raises:
        UserError: a column is missing, or prompt and text are too long together.
    """
    cache: dict[str, list[int]] = {}
    changed = []
    for rollout in rollouts:
        text = _filled(sees, rollout.prompt)
        if text not in cache:
            # A chat template writes the special tokens itself.
            cache[text] = list(tokenizer(text, add_special_tokens=rollout.prompt.messages is None)["input_ids"])
            if not cache[text]:
                raise UserError(
                    f"algorithm.teacher.sees: prompt {rollout.prompt.id} leaves the teacher nothing to read; give the "
                    "template some text of its own"
                )
        changed.append(_behind(rollout, text, cache[text]))
        read = len(changed[-1].context or changed[-1].token_ids)
        if read > context:
            raise UserError(
                f"algorithm.teacher.sees: for prompt {rollout.prompt.id} the teacher would have to read {read} tokens "
                f"and can read {context}; shorten the template or the column"
            )
    return collate(changed, pad_id=pad_id)


def check_template(prompts: Sequence[Prompt], sees: str) -> None:
    """UserError where the template does not fit a prompt's columns."""
    for prompt in prompts:
        _filled(sees, prompt)


def _filled(sees: str, prompt: Prompt) -> str:
    columns: Mapping[str, Any] = {**prompt.info, "prompt": prompt.text}
    try:
        return sees.format_map(columns)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        known = ", ".join(columns)
        raise UserError(
            f"algorithm.teacher.sees: the template does not fit prompt {prompt.id} ({error!r}); its columns are {known}"
        ) from None


def _behind(rollout: Rollout, text: str, ids: list[int]) -> Rollout:
    """The rollout with its prompt replaced; everything per token moves along. Of a source's text nothing moves."""
    if rollout.context is not None:
        return replace(rollout, prompt=replace(rollout.prompt, text=text, context=ids), marks=[])
    start, shift = rollout.start, len(ids)
    return replace(
        rollout,
        prompt=replace(rollout.prompt, text=text, token_ids=ids),
        token_ids=[*ids, *rollout.token_ids[start:]],
        mask=[False] * shift + rollout.mask[start:],
        logprobs=[0.0] * shift + rollout.logprobs[start:],
        char_ends=[0] * shift + rollout.char_ends[start:],
        versions=[-1] * shift + rollout.versions[start:],
        marks=[],
    )
