"""What an algorithm asks of a policy besides log-probabilities: of its critic, its reference, its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from instant_reward.batch import Batch
from instant_reward.policies import terms
from instant_reward.policies.critic import Critic
from instant_reward.policies.states import Reader, after_the_end, on_tokens
from instant_reward.types import PolicyOutput

if TYPE_CHECKING:
    from instant_reward.policies.learning import Learning


def ask(policy: Learning, output: PolicyOutput, head: terms.Distribution, batch: Batch) -> None:
    """Fills in what the policy's ``needs`` name, with gradient.

    Args:
        head: the policy's states and output head for the batch.
    """
    if policy.needs.entropy:
        output.entropy = on_tokens(terms.entropy(head), batch.mask)
    if policy.critic is not None:
        _ask_critic(policy, policy.critic, output, head, batch)
    if policy.needs.teacher is not None and policy.needs.teacher.whole:
        output.divergence = on_tokens(terms.divergence(head, _teacher_head(policy, batch)), batch.mask)


def _ask_critic(policy: Learning, critic: Critic, output: PolicyOutput, head: terms.Distribution, batch: Batch) -> None:
    states = critic.states(batch, head.hidden, policy.states)
    if critic.value is not None:
        output.values = on_tokens(critic.values(states), batch.mask)
    if critic.need.tables:
        targets = batch.token_ids[batch.mask].to(states.device)
        output.chosen = on_tokens(critic.chosen(states, targets), batch.mask)
    if policy.needs.top_actions is not None:
        table = critic.table(states.detach())
        output.expected = on_tokens(terms.expected_advantage(head, table, policy.needs.top_actions), batch.mask)
    if critic.slow is not None:
        tables = [critic.table(states, number) for number in range(critic.need.tables)]
        spreads = [terms.log_sum_exp(table, len(states), head.width) for table in tables]
        output.spread = on_tokens(torch.stack(spreads, 1), batch.mask)


def annotated(policy: Learning, part: Batch) -> dict[str, Tensor]:
    """What the credit needs, by the batch's own names for it; call it without gradient."""
    needs, found = policy.needs, dict[str, Tensor]()
    if needs.reference:
        with policy.as_reference() as model:
            found["ref_logprobs"] = policy.token_logprobs(policy.head(model, part), part).logprobs
    teacher = None
    if needs.teacher is not None:
        teacher = _teacher_head(policy, part)
        found["teacher_logprobs"] = policy.token_logprobs(teacher, part).logprobs
    baseline = needs.teacher is not None and needs.teacher.baseline
    own = needs.proximal or needs.own_error
    head = policy.head(policy.model, part) if own or baseline or _reads_policy(policy.critic) else None
    if own and head is not None:
        found["proximal_logprobs"] = policy.token_logprobs(head, part).logprobs
    if baseline and head is not None and teacher is not None:
        found["teacher_baseline"] = on_tokens(-terms.divergence(head, teacher), part.mask)
    if policy.critic is not None:
        found |= _values(policy.critic, head, part, policy.states)
    return found


def likeliest(policy: Learning, batch: Batch, tokens_per_part: int) -> tuple[Tensor, Tensor]:
    """The action that the policy finds likeliest in the place of each sampled one, and what it says of that one.

    Returns:
        int64 ``[B, L]``, 0 where the mask is off, and the sampled actions' log-probabilities ``[B, L]``, in the
        policy's own dtype; both without gradient.
    """
    found, logprobs = torch.zeros_like(batch.token_ids), torch.zeros(batch.token_ids.shape, dtype=torch.float64)
    with torch.no_grad():
        for rows in batch.shares(tokens_per_part):
            part = batch.select(rows)
            head = policy.head(policy.model, part)
            wide = part.token_ids.shape[1]
            targets = part.token_ids[part.mask].to(head.hidden.device)
            found[rows, :wide] = on_tokens(head.likeliest(targets), part.mask)
            logprobs[rows, :wide] = on_tokens(policy.token_logprobs(head, part).logprobs[part.mask], part.mask).double()
    return found, logprobs


def _reads_policy(critic: Critic | None) -> bool:
    """Whether a critic's values hang on the policy: on its states, or on the chances that it gives next tokens."""
    return critic is not None and (critic.base is None or critic.value is None)


def beyond_the_end(policy: Learning, critic: Critic, batch: Batch, tokens_per_part: int) -> Tensor:
    """The value after the last token of texts that were cut off, ``[B, K]``; 0 of those that finished."""
    outputs = torch.zeros(len(batch), critic.need.outputs, dtype=batch.old_logprobs.dtype)
    cut = batch.cut_off.nonzero().flatten()
    if not len(cut) or not critic.need.beyond:
        return outputs
    ends = after_the_end(batch, policy.pad_id)
    for rows in ends.shares(tokens_per_part):
        part = ends.select(rows)
        head = policy.head(policy.model, part) if _reads_policy(critic) else None
        values = _values(critic, head, part, policy.states)["values"]
        outputs[cut[rows]] = values.sum(-1).to(outputs)  # one token a row: the sum is its value
    return outputs


def _values(critic: Critic, head: terms.Distribution | None, part: Batch, reader: Reader) -> dict[str, Tensor]:
    states = critic.states(part, None if head is None else head.hidden, reader)
    if critic.value is None:
        assert head is not None, "the mean of Q under the policy needs the policy"
        return {"values": on_tokens(terms.expected_value(head, critic.table(states))[:, None], part.mask)}
    found = {"values": on_tokens(critic.values(states), part.mask)}
    if critic.slow is not None:
        targets = part.token_ids[part.mask].to(states.device)
        found["slow"] = on_tokens(critic.chosen(states, targets, slow=True).amin(1), part.mask)
    return found


def _teacher_head(policy: Learning, part: Batch) -> terms.Distribution:
    """The teacher's states and head for the texts of a part, behind the prompts that it reads."""
    with torch.no_grad(), policy.as_teacher() as model:
        return policy.head(model, part, part.shown)
