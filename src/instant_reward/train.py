"""The loop: prompts, sampled and scored texts, credit, loss, step. It is ``learn``; the rest is set-up."""

from __future__ import annotations

import json
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from instant_reward import algorithms, assemble, watching
from instant_reward._callable import make_callable
from instant_reward.batch import Batch, Learner, collate
from instant_reward.beside import Beside, Imitating, beside
from instant_reward.collect import Given, Replay, Sampled, check_source, numbered, texts_of
from instant_reward.config import Config
from instant_reward.fitting import HeldOutTexts, Texts, held_out_texts, texts_to_fit
from instant_reward.policies.optimizer import Optimization
from instant_reward.policies.policy import Policy
from instant_reward.policies.teacher import shown_to_teacher
from instant_reward.progress import Metrics
from instant_reward.records import rollout_record
from instant_reward.rewards.base import Reward, as_rewards
from instant_reward.rewards.logged import logged
from instant_reward.rewards.scope import load_states, observe, states_of
from instant_reward.run import Run
from instant_reward.sampling.draw import Settings
from instant_reward.screen import Screen
from instant_reward.start import start_policy
from instant_reward.types import Carried, Rollout, UserError
from instant_reward.watching import Course

Extra = Callable[[Policy, int], Mapping[str, float]]


@dataclass
class Job:
    """Everything a run needs, loaded and checked.

    Attributes:
        texts: where each step's texts come from; replay: earlier ones that join them.
        steps: how many steps the run has.
        held_out: texts by which the policy is judged every ``evaluate.every`` steps.
        beside: texts that are imitated beside what the algorithm does, or before it.
        carried: what the algorithm carries to the next step.
        course, followed: how the metrics of ``train.stop_when`` and ``train.follow`` have gone.
        interrupted: set by Ctrl-C; the step in hand is finished and saved.
    """

    config: Config
    run: Run
    policy: Policy
    rewards: list[Reward]
    texts: Sampled | Given | Texts
    algorithm: algorithms.Algorithm
    steps: int
    replay: Replay | None = None
    held_out: HeldOutTexts | None = None
    beside: Beside | None = None
    carried: Carried = field(default_factory=Carried)
    course: Course = field(default_factory=Course)
    followed: Course = field(default_factory=Course)
    interrupted: bool = field(default=False, repr=False)

    def phase(self, step: int) -> Phase:
        """What a step does: the algorithm's own, with another gradient beside it, or at first imitation alone."""
        if self.beside is not None and self.beside.warming(step):
            texts, algorithm, config = self.beside.texts, self.beside.algorithm, self.beside.config
            return Phase(texts, algorithm, config, [], Imitating(self.policy, bare=True), warming=True)
        learner: Learner = self.policy
        if self.algorithm.preset.loss == "likelihood":
            learner = Imitating(self.policy)
        elif self.beside is not None:
            learner = self.beside.joined(self.policy, step)
        return Phase(self.texts, self.algorithm, self.config, self.rewards, learner)


@dataclass(frozen=True)
class Phase:
    """What a step learns from, and by what; ``warming`` while demonstrations alone are imitated."""

    texts: Sampled | Given | Texts
    algorithm: algorithms.Algorithm
    config: Config
    rewards: Sequence[Reward]
    learner: Learner
    warming: bool = False


def learn(job: Job, screen: Screen, extra: Extra | None = None) -> Run:
    """Trains until the last step, until ``stop_when`` holds, or until Ctrl-C; every way ends in a checkpoint.

    Args:
        extra: called with the policy after each step; the metrics it returns join the step's.
    """
    run, policy, config = job.run, job.policy, job.config.train
    sampler = None
    if isinstance(job.texts, Sampled):  # of given texts the policy writes none
        sampler = policy.engine(sampling_settings(job.config), version=run.step)
    for step in range(run.step + 1, job.steps + 1):
        now = job.phase(step)
        count = sampler.count if sampler and not now.warming else None
        metrics = Metrics(now.rewards, count, now.algorithm.needs)
        fresh = now.texts.groups(sampler, step)
        older = job.replay.exchange(fresh, step) if job.replay and not now.warming else []
        rollouts = numbered([*fresh, *older])
        metrics.sampled(now.texts.drawn, now.texts.skipped)
        batch = collated(job, now, rollouts, len(rollouts) - sum(map(len, older)) if count else 0)
        batch = now.algorithm.credit(batch if now.warming else policy.annotate(batch, config.tokens_per_part))
        update(now.learner, now.algorithm, batch, now.config, step, metrics)
        observe(now.rewards, now.texts.drawn)
        row = metrics.row(batch, count)
        if not now.warming:
            job.carried = now.algorithm.adapt(batch, row)
        if _resets_reference(job, now, step):
            policy.reset_reference()
        row |= _held_out(job, step) | dict(extra(policy, step) if extra else {})
        last = _ends(job, now, row, step)
        if sampler:  # after the policy may have gone back to its best
            sampler.load(policy, version=step)
        kept = fresh if config.samples == "all" else fresh[:1]
        run.record(step, row, [rollout_record(rollout) for rollout in numbered(kept)])
        screen.update(step, row, rollouts[0])
        _checkpoint(job, row, step, last)
        if last:
            break
    return run


def _resets_reference(job: Job, now: Phase, step: int) -> bool:
    """Whether the reference becomes the policy as it is: every so often, and as demonstrations have made it."""
    if now.warming:
        return job.policy.needs.reference and not job.phase(step + 1).warming
    every = job.config.algorithm.reset_reference
    return every is not None and step % every == 0


def _held_out(job: Job, step: int) -> dict[str, float]:
    """What the held-out texts say of the policy, where it is time: always at the end."""
    every = job.config.evaluate.every
    if job.held_out is None or not (step == job.steps or (every and step % every == 0)):
        return {}
    return {f"held_out/{key}": value for key, value in job.held_out.measure(job.policy).items()}


def collated(job: Job, now: Phase, rollouts: Sequence[Rollout], own: int) -> Batch:
    """The step's texts as a batch, with the pieces that are its actions and what the teacher reads.

    Args:
        own: so many of the first ones are the policy's own, as it is now.
    """
    algorithm, policy = now.config.algorithm, job.policy
    batch = collate(rollouts, now.algorithm.sources, policy.pad_id, pieces=algorithm.pieces, fresh=own)
    batch.carried = job.carried
    if algorithm.teacher is not None and algorithm.teacher.sees is not None:
        batch.shown = shown_to_teacher(
            rollouts, algorithm.teacher.sees, policy.tokenizer, policy.pad_id, policy.context
        )
    return batch


def update(
    policy: Learner,
    algorithm: algorithms.Algorithm,
    batch: Batch,
    config: Config,
    step: int,
    metrics: Metrics | None = None,
) -> None:
    """The optimizer steps of one batch: so many passes, each in so many minibatches, until the policy is too far off.

    Args:
        batch: credited.
        step: which minibatches are drawn hangs on it.
        metrics: takes in what happened, where someone wants to know.
    """
    for epoch in range(config.algorithm.epochs):
        for minibatch in batch.minibatches(config.algorithm.minibatches, seed=step * 1000 + epoch):
            gone = 0.0
            for part in minibatch.parts(config.train.tokens_per_part):
                output = policy(part)
                loss = algorithm.loss(output, part)
                policy.backward(loss.loss)
                if metrics is not None:
                    metrics.learned(output, loss, part)
                gone += loss.metrics.get("ratio_kl", 0.0)
            if config.algorithm.stop_kl is not None and gone > config.algorithm.stop_kl:
                policy.forget()
                if metrics is not None:
                    metrics.stopped_early()
                return
            said = policy.step()
            if metrics is not None:
                metrics.stepped(said)


def train(
    config: Config | None = None,
    *,
    model: str = "smollm2-135m",
    prompts: Sequence[Any] | str | None = None,
    rewards: Sequence[Any] | None = None,
    algorithm: str | Mapping[str, Any] = "rloo",
    steps: int = 40,
    prompts_per_step: int = 4,
    group_size: int = 8,
    max_new_tokens: int = 32,
    min_new_tokens: int = 0,
    learning_rate: float = 1e-5,
    discount: float = 1.0,
    kl: float = 0.0,
    dtype: str = "auto",
    save_every: int | None = None,
    seed: int = 0,
    out: str | Path = "runs/first",
    resume: bool = False,
) -> Run:
    """Trains a language model from rewards on its own texts.

    Either from a whole ``Config``, or from the arguments.

    Args:
        config: everything; the other arguments but ``rewards`` and ``resume`` are then not looked at.
        model: a short name, a local folder, a GGUF file or a hub id.
        prompts: texts, lists of messages or mappings; or the path of a file with them.
        rewards: reward functions.
        algorithm: a preset's name, or a mapping of its options, ``{"name": "grpo", "timing": "ignore"}``.
        prompts_per_step, group_size: each step samples ``group_size`` texts for each of so many prompts.
        discount: per token, for rewards without a discount of their own.
        kl: the weight of the KL to the model as it was, paid per token.
        save_every: steps between checkpoints; the last step always has one.
        out: the run folder; new, or empty, or with ``resume`` one that was begun before.

    Returns:
        The run: ``run.path``, ``run.metrics`` (one dict a step), ``run.policy``.

    Raises:
        UserError: bad settings, prompts, model or folder; RewardError: a reward that failed.
    """
    if config is None:
        if prompts is None or rewards is None:
            raise UserError("train: give prompts=[...] and rewards=[...], or a Config")
        choice = {"name": algorithm} if isinstance(algorithm, str) else dict(algorithm)
        config = Config.build(
            {
                "model": {"name": str(model), "dtype": dtype},
                "data": {"path": prompts} if isinstance(prompts, str | Path) else {"prompts": list(prompts)},
                "algorithm": {"discount": discount, "kl": kl, **choice},
                "sampling": {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens},
                "train": {
                    "steps": steps,
                    "prompts_per_step": prompts_per_step,
                    "group_size": group_size,
                    "learning_rate": learning_rate,
                    "save_every": save_every,
                },
                "seed": seed,
                "out": str(out),
            },
            where="train",
        )
    return run_to_its_end(config, rewards, resume)


def run_to_its_end(config: Config, rewards: Sequence[Any] | None, resume: bool) -> Run:
    """Trains by a config, with the screen and Ctrl-C of a run in the foreground."""
    measured = config.evaluate.model_copy(update={"prompts": None})  # those the command measures, beside the loop
    watching.check_watched(config.model_copy(update={"evaluate": measured}))
    job = prepare(config, rewards, resume)
    with Screen(job.steps) as screen, interruptible(job, screen):
        return learn(job, screen)


def prepare(config: Config, rewards: Sequence[Any] | None = None, resume: bool = False) -> Job:
    """Loads and checks everything a run needs, before anything is written or trained.

    Args:
        rewards: functions in place of the config's.
        resume: go on from the run folder's newest checkpoint.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    _seed_everything(config.seed)
    if not resume:
        Run.refuse_begun(config.out)  # before anything is loaded
    named = as_rewards(rewards) if rewards is not None else assemble.build_rewards(config.rewards)
    if config.data.logged is not None:
        named = [*named, logged(config.data.logged.action, config.data.logged.reward)]
    algorithm = algorithms.build(config.algorithm, named, config.sampling.max_new_tokens)
    check_source(config, algorithm.preset)
    watching.check_watched(config)
    rows = [] if config.data.rollouts else assemble.load_prompt_rows(config.data)
    policy = start_policy(config, config.out, rows)
    likelihood = algorithm.preset.loss == "likelihood"
    texts: Sampled | Given | Texts
    if likelihood:
        texts = texts_to_fit(config, rows, policy, named)
    else:
        texts = texts_of(config, rows, policy, named, algorithm)
    steps = config.train.steps
    if config.train.epochs is not None:
        if not isinstance(texts, Texts):
            raise UserError("train.epochs: it counts passes over texts that are imitated; give train.steps")
        steps = texts.steps(config.train.epochs)
    held_out = held_out_texts(config, rows, policy)
    imitated = beside(config, policy) if config.supervised is not None else None
    if config.evaluate.prompts is not None:  # read again when they are needed; what is wrong shows now
        assemble.load_prompt_rows(config.evaluate.prompts)
        assemble.build_rewards(config.evaluate.held_out)
    warmup = config.supervised.warmup_steps if config.supervised else 0
    updates = min(warmup, steps) + max(0, steps - warmup) * config.algorithm.epochs * config.algorithm.minibatches
    needs = algorithm.needs
    given = config.data.rollouts or config.data.logged or config.train.replay
    if (given and not likelihood) or (config.data.completion and (needs.reference or needs.teacher)):
        needs = replace(needs, proximal=True)  # the sampler's log-probabilities are not the policy's own
    policy.prepare(
        Optimization(
            learning_rate=config.train.learning_rate,
            steps=updates,
            schedule=config.train.schedule,
            warmup=config.train.warmup,
            weight_decay=config.train.weight_decay,
            max_grad_norm=config.train.max_grad_norm,
        ),
        needs,
    )
    run = Run.create(config.out, config, resume=resume)  # nothing is written before all is loaded and checked
    run.policy = policy
    if config.model.drawn:
        run.save_start(policy.save)
    kept = config.train.replay
    replayed = Replay(kept.groups, kept.staleness, config.seed) if kept else None
    job = Job(config, run, policy, named, texts, algorithm, steps, replayed, held_out, imitated)
    checkpoint = run.latest_checkpoint() if resume else None
    if checkpoint is not None:
        _load(job, checkpoint)
    return job


@contextmanager
def interruptible(job: Job, screen: Screen) -> Iterator[None]:
    """Ctrl-C finishes the step in hand, saves and says how to go on; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may catch signals
        return

    def catch(number: int, frame: Any) -> None:
        if job.interrupted:
            raise KeyboardInterrupt
        job.interrupted = True
        screen.note("Ctrl-C: this step is finished and saved first; press it again to stop at once")

    before = signal.signal(signal.SIGINT, catch)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if job.interrupted:
        screen.note(f"stopped after step {job.run.step}; go on with: instant-reward train --resume {job.run.path}")


def sampling_settings(config: Config) -> Settings:
    """How a config's texts are drawn."""
    sampling = config.sampling.model_dump()
    return Settings(**{**sampling, "stop": tuple(sampling["stop"])})


def _ends(job: Job, now: Phase, row: dict[str, float], step: int) -> bool:
    """Whether this step is the last one; moves the learning rate where it follows a metric."""
    config = job.config.train
    if now.warming:  # the metrics are not those of the algorithm yet
        return step == job.steps or job.interrupted
    stop = config.stop_when
    over = (stop is not None and watching.ends(stop, job.course, row, step)) or step == job.steps
    returns = stop is not None and stop.return_to_best
    best = returns and job.course.best_step == step  # this step's checkpoint has to hold the policy that was measured
    if config.follow is not None:
        if watching.follow(config.follow, job.followed, row, step) and not best:
            _go_back(job, job.followed, row)
        job.policy.rate_factor(job.followed.factor)
    if over and returns and not best:
        _go_back(job, job.course, row)
    return over or job.interrupted


def _go_back(job: Job, course: Course, row: dict[str, float]) -> None:
    """Puts the policy back to where it was best, where there is a checkpoint of that."""
    if (best := job.run.checkpoint(course.best_step)) is not None:
        job.policy.load_best(best)
        row["returned_to"] = float(course.best_step)


def _checkpoint(job: Job, row: Mapping[str, float], step: int, last: bool) -> None:
    """A checkpoint where it is time, and of every new best value that someone may return to."""
    config, stop = job.config.train, job.config.train.stop_when
    followed = [job.followed] if config.follow is not None and config.follow.return_to_best else []
    stopped = [job.course] if stop is not None and (stop.return_to_best or stop.patience) else []
    best = {course.best_step for course in followed + stopped}
    if last or step in best or (config.save_every and step % config.save_every == 0):
        score = row.get("reward")
        if stopped and stop is not None:
            sign = -1.0 if watching.better_of(stop) == "lower" else 1.0
            score = sign * row[stop.metric] if stop.metric in row else None
        job.run.save_checkpoint(step, lambda folder: _save(job, folder), score, best)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _save(job: Job, folder: Path) -> None:
    """What the loop needs to go on bit for bit: weights, optimizer, schedule, random states, counters."""
    job.policy.save_state(folder)
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    if job.replay is not None:
        job.replay.save(folder / "replay.jsonl")
    remembered = states_of(job.rewards)
    if remembered:
        torch.save(remembered, folder / "rewards.pt")
    state = {
        "course": asdict(job.course),
        "followed": asdict(job.followed),
        "carried": asdict(job.carried),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().tolist(),
    }
    (folder / "state.json").write_text(json.dumps(state))


def _load(job: Job, folder: Path) -> None:
    job.policy.load_state(folder)
    state = json.loads((folder / "state.json").read_text())
    job.course, job.followed = Course(**state["course"]), Course(**state["followed"])
    if watching.is_over(job.config.train.stop_when, job.course):
        job.steps = job.run.step
    job.carried = Carried(**state["carried"])
    if job.replay is not None:
        job.replay.load(folder / "replay.jsonl")
    if (folder / "rewards.pt").is_file():
        load_states(job.rewards, torch.load(folder / "rewards.pt", weights_only=True))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))


make_callable(__name__, train)
