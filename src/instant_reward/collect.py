"""Where a step's texts come from: sampled afresh, sampled again for groups without difference, kept from earlier steps,
or given in a file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from instant_reward.algorithms import Algorithm
from instant_reward.batch import collate
from instant_reward.config import Config, DataConfig, LoggedConfig
from instant_reward.credit import Source
from instant_reward.data import Prompts, Row, text_in
from instant_reward.data_files import read_items
from instant_reward.policies.policy import Policy
from instant_reward.policies.teacher import check_template
from instant_reward.presets import Preset
from instant_reward.records import rollout_from_record, rollout_record
from instant_reward.rewards.base import Reward
from instant_reward.rewards.logged import number_in
from instant_reward.rewards.scope import remembering, replay_groups
from instant_reward.rewards.watch import Watch
from instant_reward.sampling.sampler import Sampler, in_order
from instant_reward.stored import Stored, on_disk
from instant_reward.text import Decoder, TextStream
from instant_reward.types import Prompt, Rollout, UserError

Group = list[Rollout]

AT_ONCE = 1024  # rows of a stream that become prompts together


class Sampled:
    """Texts from the policy itself.

    ``skipped`` counts the groups that the last step left out, and ``drawn`` holds all texts that it looked at.

    Args:
        prompts: the training prompts.
        skip_equal: leave out groups whose texts all earned the same, and sample other prompts in their place (Yu et
            al., 2025, "DAPO", equation 11), ``refill`` times at most.
        sources: the learned ones, by which equals are told.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        rewards: Sequence[Reward],
        config: Config,
        sources: Sequence[Source],
        skip_equal: bool,
    ) -> None:
        self.weights = earned_weights(sources)
        self.config, self.rewards = config, list(rewards)
        self.skip_equal = skip_equal and bool(self.weights)  # without a reward all would be equals
        per_step = config.train.prompts_per_step
        self.prompts = Prompts(prompts, per_step, config.seed)
        self.others = Prompts(prompts, per_step, config.seed + 1)
        self.skipped = 0
        self.drawn: list[Rollout] = []

    def groups(self, sampler: Sampler | None, step: int) -> list[Group]:
        """The groups of a step; where all of them are equal in every round, those of the last round."""
        assert sampler is not None, "someone has to write the texts"
        refills = self.config.algorithm.refill if self.skip_equal else 0
        wanted = self.config.train.prompts_per_step
        kept: list[Group] = []
        self.skipped, self.drawn = 0, []
        for turn in range(refills + 1):
            prompts = self.prompts.batch(step) if turn == 0 else self.others.batch((step - 1) * refills + turn)
            # Another seed in each round: the same prompt must not get the same texts again.
            found = self._sample(sampler, prompts, self.config.seed + turn * 1_000_003, step)
            differing = [group for group in found if not self.skip_equal or not _equal(group, self.weights)]
            self.skipped += len(found) - len(differing)
            self.drawn += [rollout for group in found for rollout in group]
            kept += differing
            if len(kept) >= wanted:
                break
        return kept[:wanted] or found

    def _sample(self, sampler: Sampler, prompts: Sequence[Prompt], seed: int, step: int) -> list[Group]:
        stream = sampler.stream(prompts, self.config.train.group_size, self.rewards, seed, step)
        return list(_by_group(in_order(stream)))


class Given:
    """Texts from a file, scored by replaying the rewards over them; nothing is sampled.

    Args:
        groups: the texts, those of one prompt together.
        skip_equal: leave out groups whose texts all earned the same, where others are left.
        sources: the learned ones, by which equals are told.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        rewards: Sequence[Reward],
        config: Config,
        sources: Sequence[Source],
        skip_equal: bool,
    ) -> None:
        self.rewards, self.skip_equal = list(rewards), skip_equal
        self.scored: set[int] = set()
        self.weights = earned_weights(sources)
        self.order = Prompts(list(groups), config.train.prompts_per_step, config.seed)
        self.skipped = 0
        self.drawn: list[Rollout] = []

    def groups(self, sampler: Sampler | None, step: int) -> list[Group]:
        """The groups of a step, scored."""
        del sampler  # the policy that is trained wrote none of them
        found = self.order.batch(step)
        for group in found:
            # Texts that come again keep their marks, unless a reward has learned of others in the meantime.
            if id(group) not in self.scored or remembering(self.rewards):
                replay_groups(self.rewards, group)
                self.scored.add(id(group))
        kept = [group for group in found if not self.skip_equal or not _equal(group, self.weights)]
        self.skipped = len(found) - len(kept)
        self.drawn = [rollout for group in found for rollout in group]
        return kept or found


@dataclass
class Replay:
    """Recent groups that join later steps once more.

    Attributes:
        count: how many groups join each step.
        staleness: a group may have been sampled by a policy at most so many steps old.
        kept: each group with the step that it was sampled at.
    """

    count: int
    staleness: int
    seed: int
    kept: list[tuple[int, Group]] = field(default_factory=list)

    def exchange(self, fresh: Sequence[Group], step: int) -> list[Group]:
        """Takes in a step's fresh groups; hands out older ones."""
        self.kept = [(born, group) for born, group in self.kept if step - born <= self.staleness]
        chosen = random.Random(f"{self.seed}/replay/{step}").sample(self.kept, min(self.count, len(self.kept)))
        self.kept += [(step, list(group)) for group in fresh]
        return [group for _, group in chosen]

    def save(self, path: Path) -> None:
        """Writes what is kept, a line a group."""
        lines = [
            json.dumps({"step": step, "group": [rollout_record(rollout) for rollout in group]})
            for step, group in self.kept
        ]
        path.write_text("\n".join(lines))

    def load(self, path: Path) -> None:
        """Takes back what ``save`` wrote."""
        records = [json.loads(line) for line in path.read_text().splitlines()]
        self.kept = [(one["step"], [rollout_from_record(record) for record in one["group"]]) for one in records]


def earned_weights(sources: Sequence[Source]) -> list[dict[str, float]]:
    """By which equals are told: weighted sums of what a text earns; a source whose weight changes stands alone."""
    earned = [source for source in sources if source.earned]
    fixed = {source.name: source.weight for source in earned if source.rule is None and not source.scaled}
    changing = [{source.name: 1.0} for source in earned if source.name not in fixed]
    return [fixed, *changing] if fixed else changing


def _equal(group: Group, sums: Sequence[Mapping[str, float]]) -> bool:
    """Whether all texts of a group earned the same in each of these sums."""
    for weights in sums:
        totals = [sum(weight * rollout.total(name) for name, weight in weights.items()) for rollout in group]
        if max(totals) - min(totals) >= 1e-6:
            return False
    return True


def numbered(groups: Sequence[Group]) -> list[Rollout]:
    """The texts of all groups in a row, each group with a number of its own."""
    return [replace(rollout, group=number) for number, group in enumerate(groups) for rollout in group]


def _by_group(rollouts: Sequence[Rollout]) -> Iterator[Group]:
    groups: dict[int, Group] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    yield from groups.values()


def texts_of(
    config: Config,
    rows: Sequence[Mapping[str, Any]],
    policy: Policy,
    rewards: Sequence[Reward],
    algorithm: Algorithm,
) -> Sampled | Given:
    """Where a run's texts come from: given in a file or in a column, or sampled from the policy.

    Args:
        rows: the data's; none where whole rollouts are given.
    """
    if config.data.rollouts is not None:
        recorded = recorded_groups(config.data.rollouts)
        check_recorded(recorded, policy, config.model.max_context, _takes_ratios(config, algorithm.preset))
        _check_sizes(recorded, config, algorithm.preset)
        _check_teacher([group[0].prompt for group in recorded], config)
        return Given(recorded, rewards, config, algorithm.sources, algorithm.preset.skip_equal)
    room = 0 if config.data.given else config.sampling.max_new_tokens
    prompts = prompts_of(config.data, rows, policy, room, config.model.max_context)
    _check_teacher(prompts, config)
    if config.data.completion is not None:
        written = written_groups(prompts, config.data.completion, policy)
        _check_sizes(written, config, algorithm.preset)
        return Given(written, rewards, config, algorithm.sources, algorithm.preset.skip_equal)
    if config.data.logged is not None:
        logs = logged_groups(prompts, config.data.logged, policy)
        _check_sizes(logs, config, algorithm.preset)
        return Given(logs, rewards, config, algorithm.sources, algorithm.preset.skip_equal)
    return Sampled(prompts, rewards, config, algorithm.sources, algorithm.preset.skip_equal)


def prompts_of(
    data: DataConfig, rows: Sequence[Mapping[str, Any]], policy: Policy, room: int, most: int | None
) -> Sequence[Prompt]:
    """The prompts of the data, on disk where its rows are; where it has none, the opening token alone, with the columns
    beside it."""
    column = data.prompt_column

    def made(some: Sequence[Mapping[str, Any]]) -> list[Prompt]:
        found = policy.unprompted(some) if column is None else policy.prompts(some, column, room, most)
        return [replace(one, where=getattr(row, "where", "")) for row, one in zip(some, found, strict=True)]

    if not on_disk(rows):
        return made(rows)
    starts = range(0, len(rows), AT_ONCE)
    return Stored(prompt for start in starts for prompt in made(_with_ids(rows, start)))


def _with_ids(rows: Sequence[Mapping[str, Any]], start: int) -> list[Row]:
    """Some of the rows; those without an id have their number in the whole as one."""
    some = [(number, rows[number]) for number in range(start, min(start + AT_ONCE, len(rows)))]
    return [Row({"id": number, **row}, getattr(row, "where", f"prompt {number}")) for number, row in some]


def _check_teacher(prompts: Sequence[Prompt], config: Config) -> None:
    teacher = config.algorithm.teacher
    if teacher is not None and teacher.sees is not None:
        check_template(prompts, teacher.sees)


def _check_sizes(groups: Sequence[Group], config: Config, preset: Preset) -> None:
    """Refuses a comparison of siblings that have none. "raft" may: alone in its group, each text is the best."""
    compares = preset.groups and preset.weigh != "best"
    if compares and max(map(len, groups)) < 2:
        raise UserError(
            f"data: {config.algorithm.name} compares the texts of one prompt, and each prompt here has one; give more, "
            "or use awr, raft, ilql or value"
        )


def _takes_ratios(config: Config, preset: Preset) -> bool:
    """Whether the texts' log-probabilities are compared with the policy's, which makes up for another sampler."""
    compares = preset.loss in ("clipped", "cispo", "doubly_robust") or preset.returns == "vtrace"
    return compares or config.algorithm.importance is not None


def check_source(config: Config, preset: Preset) -> None:
    """Refuses texts that an algorithm would take for the policy's own.

    Raises:
        UserError: names the option that makes up for it, or what a guided decoding needs.
    """
    corrected = _takes_ratios(config, preset)
    # Of next tokens, the one-step target holds whoever wrote the text.
    one_step = preset.loss == "all_actions" and config.algorithm.critic.lam == 0
    imitates = preset.weigh != "none" or preset.loss in ("ilql", "likelihood", "none") or one_step
    given = config.data.given
    if preset.loss == "likelihood" and not given:
        raise UserError(
            "algorithm.name: likelihood learns from given texts, and none are given; name their column by "
            "data.completion, or use rloo to learn from the policy's own"
        )
    if config.data.too_long != "refuse" and preset.loss != "likelihood":
        raise UserError(f"data.too_long: {config.algorithm.name} judges whole texts; leave it out, or use likelihood")
    if config.data.masks is not None and preset.loss != "likelihood":
        raise UserError(
            f"data.masks: {config.algorithm.name} learns nothing of them; use likelihood, or supervised.data"
        )
    if config.sampling.guide and (preset.loss != "ilql" or config.algorithm.critic.model != "head"):
        raise UserError(
            "sampling.guide: it takes a critic of next tokens on the policy's own trunk; set algorithm.name to ilql "
            "and algorithm.critic.model to head, or leave it out"
        )
    if given and config.algorithm.kl_target is not None:
        raise UserError(
            "algorithm.kl_target: the KL is measured on texts of the policy's own, and these are given; leave it out"
        )
    if (config.train.replay or given) and not corrected and not imitates:
        instead = "use awr, rwr, raft, ilql or value"
        if not config.data.completion:
            instead = "use doubly_robust, or " if config.data.logged else ""
            instead += "set algorithm.importance, or use ppo, vtrace, awr, raft, ilql, or qac with critic.lam=0"
        raise UserError(
            f"{'data' if given else 'train.replay'}: {config.algorithm.name} takes these texts for the policy's own, "
            f"which biases its step; {instead}"
        )
    if config.data.completion and (not imitates or config.algorithm.importance):
        raise UserError(
            "data.completion: nobody knows with what chances these texts were written, so ratios to them mean "
            "nothing; use awr, rwr, raft, ilql or value"
        )
    if given and config.data.stream and preset.loss != "likelihood":
        raise UserError(
            f"data.stream: {config.algorithm.name} puts given texts of one prompt together, for which all are held in "
            "memory; leave it out, or use likelihood"
        )
    if given and config.train.replay:
        raise UserError("train.replay: the texts are given and come again in every epoch; leave it out")


def recorded_groups(path: str | Path) -> list[Group]:
    """The texts that a run wrote into its ``samples.jsonl``, or that ``rollout_record`` made, by prompt and step.

    Raises:
        UserError: the file is not there, or a line is no record.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"data.rollouts: there is no file {file}; name a run's samples.jsonl")
    groups: dict[Any, Group] = {}
    for where, record in read_items(file):
        try:
            rollout = rollout_from_record(record)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        key = (record.get("step"), rollout.group, tuple(rollout.prompt.token_ids), str(rollout.context))
        groups.setdefault(key, []).append(rollout)
    if not groups:
        raise UserError(f"data.rollouts: {file} holds no texts; name another file")
    return list(groups.values())


def check_recorded(
    groups: Sequence[Group], policy: Policy, max_context: int | None = None, ratios: bool = False
) -> None:
    """Refuses texts that this policy cannot have written or cannot read.

    Args:
        ratios: whether their log-probabilities are compared with the policy's.

    Raises:
        UserError: another tokenizer's tokens, texts too long, or drawn at different temperatures or at none.
    """
    texts = [rollout for group in groups for rollout in group]
    room = min(policy.context, max_context or policy.context)
    size = policy.actions
    decoder = policy.decoder()
    for number, rollout in enumerate(texts):
        where = f"data.rollouts: the text {rollout.id}"
        if len(rollout.token_ids) > room:
            raise UserError(f"{where} has {len(rollout.token_ids)} tokens, and the model reads {room}; leave it out")
        foreign = max(rollout.token_ids) >= size
        if number < 8 and not foreign and all(rollout.mask[rollout.start :]):
            foreign = spelt(decoder.stream(rollout.prompt), rollout.token_ids[rollout.start :]) != rollout.text
        if foreign:
            raise UserError(f"{where} is of another tokenizer than the model's; use that model, or other texts")
        if not any(rollout.mask):
            raise UserError(f"{where} has no token that was sampled; leave it out")
    reshaped = next((rollout.id for rollout in texts if rollout.reshaped), None)
    if reshaped is not None and ratios:
        raise UserError(
            f"data.rollouts: the text {reshaped} was drawn with top-k, top-p or guidance, so ratios to its "
            "log-probabilities mean nothing; use awr, rwr, raft, ilql or value, or texts drawn without"
        )
    temperatures = {rollout.temperature for rollout in texts}
    if len(temperatures) > 1 or min(temperatures) <= 0:
        listed = ", ".join(f"{one:g}" for one in sorted(temperatures))
        raise UserError(
            f"data.rollouts: the texts were drawn at temperature {listed}, and all must have one, above 0; split them"
        )


def spelt(stream: TextStream, ids: Sequence[int]) -> str:
    """The text that a stream makes of actions."""
    return "".join(map(stream.push, ids)) + stream.flush()


def written_groups(prompts: Sequence[Prompt], column: str, policy: Policy) -> list[Group]:
    """Texts of the data's own as rollouts: the prompt, the text in ``column`` and an end token; by prompt.

    Their log-probabilities are the policy's as it is now: nobody knows with what chances they were written.

    Raises:
        UserError: a row has no such column, or its text is empty or too long.
    """
    decoder = policy.decoder()
    groups: dict[str, Group] = {}
    for number, prompt in enumerate(prompts):
        ids = actions_for(prompt, column, policy)
        check_fits(prompt, ids, policy.context)
        rollout = written_rollout(prompt, ids, number, policy, decoder)
        groups.setdefault(prompt.text, []).append(rollout)
    texts = [rollout for group in groups.values() for rollout in group]
    for start in range(0, len(texts), 64):
        some = texts[start : start + 64]
        scored = policy.score(collate(some, pad_id=policy.pad_id))
        for row, rollout in enumerate(some):
            rollout.logprobs = scored[row, : len(rollout.token_ids)].tolist()
    return list(groups.values())


def logged_groups(prompts: Sequence[Prompt], columns: LoggedConfig, policy: Policy) -> list[Group]:
    """Logged decisions as rollouts, each alone in its group, with the chance that it had been chosen with.

    Raises:
        UserError: names the row whose action is unknown, or whose reward or propensity is no number that fits.
    """
    decoder = policy.decoder()
    groups = []
    for number, prompt in enumerate(prompts):
        where = f"data.logged: {prompt.place}"
        number_in(prompt.info, columns.reward, where)
        chance = number_in(prompt.info, columns.propensity, where, highest=1.0)
        ids = actions_for(prompt, columns.action, policy, "data.logged")
        if len(ids) != 1:
            raise UserError(
                f"{where} has an action of {len(ids)} steps, and a propensity is of one decision; use a "
                "classifier, or data.rollouts"
            )
        rollout = written_rollout(prompt, ids, number, policy, decoder)
        rollout.logprobs[-1] = math.log(chance)
        groups.append([rollout])
    return groups


def actions_for(prompt: Prompt, column: str, policy: Policy, option: str = "data.completion") -> list[int]:
    """The actions that write the text in a prompt's column.

    Raises:
        UserError: there is no such column, or its text is empty.
    """
    text = text_in(prompt, column, option)
    try:
        return policy.actions_of(text, prompt)
    except UserError as error:
        if prompt.where in ("", f"prompt {prompt.id}"):  # the policy has said as much
            raise
        raise UserError(f"{prompt.where}: {error}") from error


def check_fits(prompt: Prompt, ids: Sequence[int], room: int) -> None:
    """Refuses a text that is too long to be read behind its prompt.

    Raises:
        UserError: names the prompt.
    """
    length = len(prompt.token_ids) + len(ids)
    if length > room:
        raise UserError(
            f"{prompt.place} has {length} tokens, prompt included, and the model reads {room}; shorten it, or set "
            "too_long of its data to cut or split where the texts are imitated"
        )


def written_rollout(prompt: Prompt, ids: Sequence[int], number: int, policy: Policy, decoder: Decoder) -> Rollout:
    """The rollout of a text that the policy did not write; nobody knows with what chances it was written."""
    length = len(prompt.token_ids) + len(ids)
    watch = Watch([], decoder)
    watch.open(number, prompt)
    watch.feed(number, ids, True)
    drafts = watch.drafts(number)
    characters, char_ends, _ = watch.close(number)
    first = len(prompt.token_ids)
    return Rollout(
        id=f"{prompt.id}/{number}",
        group=0,
        prompt=prompt,
        token_ids=[*prompt.token_ids, *ids],
        mask=[False] * first + [True] * len(ids),
        logprobs=[0.0] * length,
        char_ends=char_ends,
        text=characters,
        marks=[],
        versions=[-1] * first + [0] * len(ids),
        stop="ended" if policy.over(ids, prompt) else "length",
        drafts=drafts,
        info=prompt.info,
    )
