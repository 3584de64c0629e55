"""Likelihood beside a reward: given texts are imitated in the same optimizer steps, or in steps of their own first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from instant_reward import algorithms, assemble
from instant_reward.algorithms import Algorithm
from instant_reward.batch import Batch, Learner, collate
from instant_reward.collect import numbered
from instant_reward.config import AlgorithmConfig, Config, SupervisedConfig
from instant_reward.fitting import Texts, ordered, written
from instant_reward.policies.policy import Policy
from instant_reward.types import Carried, PolicyOutput
from instant_reward.weights import planned


class Through:
    """A policy as it learns; what changes something of that begins here."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(self, batch: Batch) -> PolicyOutput:
        """See ``Learner``."""
        return self.policy(batch)

    def backward(self, loss: Tensor) -> None:
        """See ``Learner``."""
        self.policy.backward(loss)

    def forget(self) -> None:
        """See ``Learner``."""
        self.policy.forget()

    def step(self) -> dict[str, float]:
        """See ``Learner``."""
        return self.policy.step()


class Imitating(Through):
    """A policy as it learns from given texts: its dropout is on.

    Args:
        bare: log-probabilities alone, nothing of what the run's algorithm asks for besides.
    """

    def __init__(self, policy: Policy, bare: bool = False) -> None:
        super().__init__(policy)
        self.bare = bare

    def __call__(self, batch: Batch) -> PolicyOutput:
        """See ``Learner``."""
        with self.policy.dropping_out():
            if not self.bare:
                return self.policy(batch)
            return self.policy.token_logprobs(self.policy.head(self.policy.model, batch), batch)


class Joined(Through):
    """A policy that takes the gradient of given texts into each of its optimizer steps.

    Args:
        step: the run's, from which the texts and their weight follow.
    """

    def __init__(self, policy: Policy, beside: Beside, step: int) -> None:
        super().__init__(policy)
        self.beside, self.run_step, self.done = beside, step, 0

    def step(self) -> dict[str, float]:
        """See ``Learner``; what it says holds the texts' mean error in nats per token, and their weight."""
        said = self.beside.backward(self.policy, self.run_step, self.done)
        self.done += 1
        return self.policy.step() | said


@dataclass
class Beside:
    """Given texts beside what a run samples.

    Attributes:
        texts: where they come from; algorithm: "likelihood".
        config: the run's, as it is while they alone are learned from.
        updates: the most optimizer steps that one of the run's steps has.
    """

    own: SupervisedConfig
    texts: Texts
    algorithm: Algorithm
    config: Config
    updates: int

    def warming(self, step: int) -> bool:
        """Whether a step imitates, and does nothing else."""
        return step <= self.own.warmup_steps

    def joined(self, policy: Policy, step: int) -> Learner:
        """The policy with these texts' gradient in each optimizer step of a step."""
        return Joined(policy, self, step)

    def backward(self, policy: Policy, step: int, done: int) -> dict[str, float]:
        """Adds ``weight`` times the gradient of a batch's mean negative log-likelihood.

        Args:
            done: how many optimizer steps this step has taken already: each has texts of its own.
        """
        weight = planned(self.own.weight, Carried(step=step - 1))
        said = {"supervised/weight": weight}
        if weight == 0.0:
            return said
        later = step - self.own.warmup_steps - 1
        fresh = self.texts.groups(None, self.own.warmup_steps + later * self.updates + done + 1)
        batch = self.algorithm.credit(collate(numbered(fresh), self.algorithm.sources, policy.pad_id))
        learner, nll = Imitating(policy, bare=True), 0.0
        for part in batch.parts(self.config.train.tokens_per_part):
            found = self.algorithm.loss(learner(part), part)
            learner.backward(weight * found.loss)
            nll += found.metrics["nll"]
        return said | {"supervised/nll": nll}


def beside(config: Config, policy: Policy) -> Beside:
    """What a config says is imitated beside the rest.

    Raises:
        UserError: the texts cannot be used.
    """
    own = config.supervised
    assert own is not None, "the config has no such section"
    rows = assemble.load_prompt_rows(own.data)
    rollouts = written(own.data, rows, policy, config.model.max_context, "supervised.data")
    order = ordered(rollouts, own.texts_per_step, own.tokens_per_step, config.seed)
    texts = Texts(rollouts, order, policy, [], config.train.tokens_per_part)
    chosen = AlgorithmConfig(name="likelihood")
    algorithm = algorithms.build(chosen, [], config.sampling.max_new_tokens)
    updates = config.algorithm.epochs * config.algorithm.minibatches
    return Beside(own, texts, algorithm, config.model_copy(update={"algorithm": chosen}), updates)
