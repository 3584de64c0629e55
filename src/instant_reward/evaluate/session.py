"""A training from the command line: measure before, train, measure after, and write down what changed."""

from __future__ import annotations

from rich.console import Console

from instant_reward.config import Config
from instant_reward.evaluate.held_out import HeldOut, Measurement
from instant_reward.evaluate.plot import learning_curve
from instant_reward.evaluate.report import write_report
from instant_reward.evaluate.table import Row, compare
from instant_reward.policies.policy import Policy
from instant_reward.screen import Screen
from instant_reward.train import Job, interruptible, learn, prepare


def run_session(config: Config, resume: bool = False) -> int:
    """Trains by a config; with held-out prompts there, also compares before and after. Returns the exit code."""
    console = Console()
    job = prepare(config, resume=resume)
    if job.run.step >= config.train.steps:
        console.print(f"{job.run.path} has its {config.train.steps} steps already; raise train.steps to go on")
        return 0
    held_out = HeldOut(config, job.rewards, job.policy) if config.evaluate.prompts else None
    before = _before(job, held_out, console) if held_out else None
    every = config.evaluate.every

    def extra(policy: Policy, step: int) -> dict[str, float]:
        if held_out is None or every is None or step % every:
            return {}
        figures = held_out.measure(policy).figures
        return {f"held_out/{key}": value for key, value in figures.items()}

    with Screen(config.train.steps, console) as screen, interruptible(job, screen):
        learn(job, screen, extra)
    if job.interrupted:
        return 130
    rows: list[Row] = []
    after = None
    if held_out and before:
        with console.status("measuring on the held-out prompts"):
            after = held_out.measure(job.policy)
        after.write(job.run.path / "held_out" / "after.json")
        table, rows = compare(before.figures, after.figures, held_out.labels)
        console.print(table)
    _write_down(job, rows, before, after, console)
    return 0


def _before(job: Job, held_out: HeldOut, console: Console) -> Measurement:
    """How the policy was before its first step: measured now, or read where the run is resumed."""
    path = job.run.path / "held_out" / "before.json"
    if path.is_file():
        return Measurement.read(path)
    with console.status("measuring on the held-out prompts"):
        before = held_out.measure(held_out.reference)
    before.write(path)
    return before


def _model_in(job: Job) -> str:
    """Where ``from_pretrained`` finds the trained model; an adapter lies in the checkpoint alone."""
    checkpoint = job.run.latest_checkpoint()
    assert checkpoint is not None, "training ends with a checkpoint"
    return str(checkpoint / "policy" if (checkpoint / "policy").is_dir() else checkpoint)


def _write_down(
    job: Job, rows: list[Row], before: Measurement | None, after: Measurement | None, console: Console
) -> None:
    folder = job.run.path
    curve = learning_curve(job.run.metrics, folder / "curve.png")
    report = write_report(
        folder,
        job.config.dump(),
        job.run.metrics,
        rows,
        before.rollouts if before else [],
        after.rollouts if after else [],
        curve,
    )
    console.print(f"report: {report}\ncurve:  {curve}\nmodel:  {_model_in(job)}", highlight=False)
    console.print(f"sample: instant-reward sample {folder} 'The film begins with'", highlight=False)
