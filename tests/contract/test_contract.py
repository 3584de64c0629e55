"""What every kind of policy keeps, whatever its model: an entry in ``kinds.KINDS`` is all that another one takes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import instant_reward as ir
from contract.kinds import KINDS, Kind, every_text
from exact.world import chance
from instant_reward import algorithms
from instant_reward.batch import Batch, collate
from instant_reward.config import AlgorithmConfig
from instant_reward.losses import policy_gradient
from instant_reward.policies.policy import Policy
from instant_reward.types import Needs

torch.set_num_threads(1)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
NEAR = {torch.float64: 1e-10, torch.float32: 5e-5}


def sampled(kind: Kind, policy: Policy, **options: Any) -> list[ir.Rollout]:
    """Four texts of each prompt, more than there are rows: they take each other's place."""
    return policy.sample(list(kind.rows), per_prompt=4, **{**kind.sample, **options})


def batch_of(policy: Policy, rollouts: list[ir.Rollout]) -> Batch:
    return collate(rollouts, pad_id=policy.pad_id, dtype=torch.float64)


def read(policy: Policy, batch: Batch) -> Tensor:
    with torch.no_grad():
        return policy(batch).logprobs.double()


def trained(policy: Policy) -> list[Tensor]:
    """The weights that learn: all, or an adapter's and those beside it."""
    return [one for one in policy.model.parameters() if one.requires_grad]


@every_dtype
@every_kind
def test_what_was_sampled_has_the_chance_it_was_sampled_with(kind: Kind, dtype: torch.dtype) -> None:
    """The sampler's log-probabilities are the trainer's, at another temperature and with forbidden ends too."""
    policy = kind.policy(dtype)
    for options in ({}, {"temperature": 0.7}, {"temperature": 1.4, "min_new_tokens": 2}):
        rollouts = sampled(kind, policy, **options)
        batch = batch_of(policy, rollouts)
        gap = (read(policy, batch) - batch.old_logprobs).abs()
        assert float(gap[batch.mask].max()) <= NEAR[dtype], options
        lengths = {sum(rollout.mask) for rollout in rollouts}
        assert len(lengths) > 2 or kind.longest == 1, "texts must leave at different times"
        other = replace(batch, temperature=batch.temperature * 1.1)
        assert float((read(policy, other) - batch.old_logprobs).abs()[batch.mask].max()) > 1e-3


@every_kind
def test_forbidden_ends_are_left_out_of_the_gradient_too(kind: Kind) -> None:
    """Along a direction of the weights, log-probabilities and entropies change as their gradients say."""
    policy = kind.policy(torch.float64)
    batch = batch_of(policy, sampled(kind, policy, temperature=1.0, min_new_tokens=2))
    policy.needs = Needs(entropy=True)
    weights = trained(policy)
    generator = torch.Generator().manual_seed(0)
    ways = [torch.randn(one.shape, generator=generator, dtype=one.dtype) for one in weights]
    for table in (one for one in policy.model.modules() if isinstance(one, torch.nn.Embedding)):
        # To which torch gives no gradient, also where a text has this token.
        if table.padding_idx is not None and table.weight.requires_grad:
            ways[next(k for k, one in enumerate(weights) if one is table.weight)][table.padding_idx] = 0

    def both() -> Tensor:
        output = policy(batch)
        assert output.entropy is not None
        return output.logprobs.sum() + 3 * output.entropy.sum()

    found = torch.autograd.grad(both(), weights, allow_unused=True)
    slope = sum(float((one * way).sum()) for one, way in zip(found, ways, strict=True) if one is not None)
    step, sides = 1e-6, list[float]()
    for sign in (1, -2):
        with torch.no_grad():
            for one, way in zip(weights, ways, strict=True):
                one.add_(way, alpha=sign * step)
            sides.append(float(both()))
    assert slope == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4)


@every_kind
def test_nothing_counts_outside_the_mask(kind: Kind) -> None:
    """Where the mask is off the output is 0, and without gradient; where it is on, it is what it was."""
    policy = kind.policy(torch.float64)
    batch = batch_of(policy, sampled(kind, policy))
    whole = read(policy, batch)
    assert not whole[~batch.mask].any()
    assert (whole[batch.mask] < 0).all()
    on = batch.mask.nonzero()
    kept = on[::2]
    some = torch.zeros_like(batch.mask)
    some[kept[:, 0], kept[:, 1]] = True
    output = policy(replace(batch, mask=some)).logprobs
    assert torch.equal(output.detach() != 0, some)
    assert torch.allclose(output.detach()[some].double(), whole[some], atol=1e-12, rtol=0)
    gradients = torch.autograd.grad((output * ~some).sum(), trained(policy), allow_unused=True, retain_graph=True)
    assert all(one is None or not one.any() for one in gradients)


@every_kind
def test_padding_and_company_change_nothing(kind: Kind) -> None:
    """A text reads the same alone, beside others, and before any number of pad tokens of any kind."""
    policy = kind.policy(torch.float64)
    batch = batch_of(policy, sampled(kind, policy))
    whole = read(policy, batch)
    for row in range(len(batch)):
        alone = batch.select([row])
        width = alone.token_ids.shape[1]
        assert torch.allclose(read(policy, alone), whole[row : row + 1, :width], atol=1e-10, rtol=0), row
    beyond = torch.arange(batch.token_ids.shape[1]) >= batch.length[:, None]
    assert beyond.any() or kind.longest == 1
    assert torch.allclose(
        read(policy, replace(batch, token_ids=batch.token_ids.masked_fill(beyond, 1))), whole, atol=1e-10, rtol=0
    )
    turned = list(range(len(batch)))[::-1]
    assert torch.allclose(read(policy, batch.select(turned)), whole[turned], atol=1e-10, rtol=0)
    rollouts = sampled(kind, policy)
    for fewer in (1, 64):
        again = sampled(kind, policy, rows=fewer)
        assert [one.token_ids for one in again] == [one.token_ids for one in rollouts]


@every_dtype
@every_kind
def test_saved_and_loaded_it_says_the_same(kind: Kind, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = kind.policy(dtype)
    batch = batch_of(policy, sampled(kind, policy))
    policy.save(tmp_path / "policy")
    again = ir.load_policy(str(tmp_path / "policy"), dtype=str(dtype).removeprefix("torch."))
    assert type(again) is type(policy)
    # transformers' own norms compute in float32, also in a float64 model; what is saved has an adapter added in.
    rounded = dtype == torch.float32 and "adapter" in kind.name
    near = 1e-5 if rounded or kind.name in ("llama", "t5") else 1e-12
    assert torch.allclose(read(again, batch), read(policy, batch), atol=near, rtol=0)
    texts = [[one.text for one in sampled(kind, which)] for which in (policy, again)]
    assert texts[0] == texts[1]
    with torch.no_grad():
        for weight in again.model.parameters():
            weight.mul_(1.1)
    assert not torch.allclose(read(again, batch), read(policy, batch), atol=1e-3, rtol=0)


def config(kind: Kind, model: Path, out: Path, steps: int, **train: Any) -> ir.Config:
    sections = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"prompts": [dict(row) for row in kind.rows]},
        "algorithm": {"name": "rloo", "kl": 0.001},
        "train": {"steps": steps, "prompts_per_step": 2, "learning_rate": 1e-2, "threads": 1, **train},
        "out": str(out),
    }
    for name, section in kind.sections.items():
        sections[name] = {**sections.get(name, {}), **section} if isinstance(section, dict) else section
    return ir.Config.build(sections)


@pytest.fixture
def model(kind: Kind, tmp_path: Path) -> Path:
    return kind.policy(torch.float32).save(tmp_path / "model")


class Dies:
    """The task's reward, and a power cut in the middle of a step."""

    def __init__(self, reward: Any, after: int | None) -> None:
        self.reward, self.left = reward, after

    def cut(self, view: ir.View) -> float:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("the power is gone")
        return 0.0

    def rewards(self) -> list[Any]:
        return [self.reward, ir.reward(every="end", name="cut")(self.cut)]


@every_kind
def test_killed_in_the_middle_of_a_step_and_resumed_it_is_the_same_run(kind: Kind, model: Path, tmp_path: Path) -> None:
    """Metrics, texts and weights are those of a run that was let be, bit for bit."""
    options: dict[str, Any] = {"group_size": 2, "save_every": 1, "keep": 9}
    whole, killed = (config(kind, model, tmp_path / name, 4, **options) for name in ("whole", "killed"))
    ir.train(whole, rewards=Dies(kind.reward, None).rewards())
    with pytest.raises(ir.RewardError, match="power"):
        ir.train(killed, rewards=Dies(kind.reward, 4 * 2 + 1).rewards())
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == 2
    assert what_counts(tmp_path / "killed") != what_counts(tmp_path / "whole")
    ir.train(killed, rewards=Dies(kind.reward, None).rewards(), resume=True)
    assert what_counts(tmp_path / "killed") == what_counts(tmp_path / "whole")


def what_counts(out: Path) -> dict[str, Any]:
    """All that a run leaves, without what the clock says."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in row.items() if "time/" not in k and k != "tokens_per_second"} for row in rows]
    last = max((out / "checkpoints").iterdir())
    weights = {
        f"{file.relative_to(last)}/{name}": tensor.tolist()
        for file in last.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    return {"metrics": plain, "samples": (out / "samples.jsonl").read_text(), "weights": weights}


@every_kind
def test_the_step_is_the_exact_gradient(kind: Kind) -> None:
    """REINFORCE over all texts, each by its chance, is the gradient of the enumerated objective.

    E[ sum_t grad log p(x_t | x_<t) R(x) ] = grad sum_x p(x) R(x)
    """
    policy, prompt = kind.few()
    final = ir.reward(every="end", name="final")(lambda view: chance(view.text))
    rollouts = every_text(policy, prompt, kind.longest, [final])
    chances = kind.chances(policy, rollouts)
    assert float(chances.detach().sum()) == pytest.approx(1.0, abs=1e-10)
    worth = torch.tensor([rollout.total() for rollout in rollouts], dtype=torch.float64)
    weights = trained(policy)
    wanted = torch.autograd.grad((chances * worth).sum(), weights, allow_unused=True)
    algorithm = algorithms.build(AlgorithmConfig(name="reinforce", baseline="none"), [final], kind.longest)
    batch = algorithm.credit(collate(rollouts, algorithm.sources, policy.pad_id, dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch)):
        part = replace(batch.select([row]), text_count=1, token_count=int(batch.mask[row].sum()))
        total = total + chances[row].detach() * algorithm.loss(policy(part), part).loss
    found = torch.autograd.grad(-total, weights, allow_unused=True)
    assert max(float(one.abs().max()) for one in wanted if one is not None) > 1e-3
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.allclose(one, other, atol=1e-10, rtol=0)


@every_kind
def test_any_split_takes_the_same_step(kind: Kind) -> None:
    """The gradient of a batch is the sum of its parts', siblings together or apart."""
    policy = kind.policy(torch.float64)
    bare = batch_of(policy, sampled(kind, policy))
    generator = torch.Generator().manual_seed(0)
    batch = replace(bare, advantages=torch.randn(bare.mask.shape, generator=generator, dtype=torch.float64))
    weights = trained(policy)

    def gradient(parts: list[Batch]) -> Tensor:
        losses = [policy_gradient(policy(part).logprobs, part).loss for part in parts]
        found = torch.autograd.grad(torch.stack(losses).sum(), weights, allow_unused=True)
        return torch.cat([one.flatten() for one in found if one is not None])

    whole = gradient([batch])
    rows = list(range(len(batch)))
    for parts in ([rows[::2], rows[1::2]], [rows[:1], rows[1:4], rows[4:]], [[row] for row in rows]):
        found = gradient([batch.select(part) for part in parts])
        assert torch.allclose(found, whole, atol=1e-10, rtol=1e-9)
    assert not torch.allclose(gradient([batch.select(rows[1:])]), whole, atol=1e-6)


@every_kind
def test_it_learns_a_small_task(kind: Kind, model: Path, tmp_path: Path) -> None:
    """The mean reward of the last steps passes the kind's level, from below half of it."""
    run = ir.train(config(kind, model, tmp_path / "run", kind.steps, group_size=8), rewards=[kind.reward])
    curve = [row["reward"] for row in run.metrics]
    first, last = curve[0], sum(curve[-5:]) / 5
    assert first < kind.level / 2, (first, last)
    assert last > kind.level, (first, last)
    assert all(math.isfinite(value) for row in run.metrics for value in row.values())
