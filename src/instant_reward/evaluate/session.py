"""A training from the command line: measure before, train, measure after, and write down what changed."""

from __future__ import annotations

import json
import shlex

from rich.console import Console

from instant_reward.config import Config
from instant_reward.evaluate.held_out import HeldOut, Measurement
from instant_reward.evaluate.plot import learning_curve
from instant_reward.evaluate.report import write_report
from instant_reward.evaluate.table import Row, compare
from instant_reward.policies.policy import Policy
from instant_reward.screen import Screen
from instant_reward.train import Job, interruptible, learn, prepare
from instant_reward.watching import is_over

LONGEST_HINT = 60  # characters of a prompt that is offered to be tried

TEXT_LABELS = {
    "nll": "nats per token",
    "perplexity": "perplexity",
    "bits_per_character": "bits per character",
    "accuracy": "accuracy",
}


def run_session(config: Config, resume: bool = False) -> int:
    """Trains by a config; with held-out prompts there, also compares before and after. Returns the exit code."""
    console = Console()
    job = prepare(config, resume=resume)
    if job.run.step >= job.steps and not _killed_before_its_report(job):
        more = "raise train.steps" if config.train.epochs is None else "raise train.epochs"
        if is_over(config.train.stop_when, job.course):
            more = "its train.stop_when has ended it; change that"
        console.print(f"{job.run.path} has its {job.steps} steps already; {more} to go on")
        return 0
    held_out = HeldOut(config, job.rewards, job.policy) if config.evaluate.prompts else None
    before = _before(job, held_out, console) if held_out else None
    texts_before = _texts_before(job, console) if job.held_out else {}
    every = config.evaluate.every

    def extra(policy: Policy, step: int) -> dict[str, float]:
        if held_out is None or every is None or step % every:  # held-out texts are measured by the loop itself
            return {}
        figures = held_out.measure(policy).figures
        return {f"held_out/{key}": value for key, value in figures.items()}

    with Screen(job.steps, console) as screen, interruptible(job, screen):
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
    if job.held_out:
        with console.status("measuring on the held-out texts"):
            figures = job.held_out.measure(job.policy)
        table, of_texts = compare(texts_before, figures, TEXT_LABELS, "Held-out texts, before and after")
        console.print(table)
        rows = [*rows, *of_texts]
    _write_down(job, rows, before, after, console)
    return 0


def _killed_before_its_report(job: Job) -> bool:
    """Whether all steps are done and saved, and what comes after them is not."""
    measured = job.held_out is not None or job.config.evaluate.prompts is not None
    known = (job.run.path / "held_out").is_dir() or not measured  # what it was before is not to be had again
    return known and not (job.run.path / "report.html").is_file()


def _texts_before(job: Job, console: Console) -> dict[str, float]:
    """What the held-out texts said of the policy before its first step: measured now, or read in a resumed run."""
    assert job.held_out is not None, "the config names no held-out texts"
    path = job.run.path / "held_out" / "texts_before.json"
    if not path.is_file():
        with console.status("measuring on the held-out texts"):
            found = job.held_out.measure(job.policy)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    read: dict[str, float] = json.loads(path.read_text())
    return read


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
    console.print(f"sample: instant-reward sample {folder} {_to_try(job)}", highlight=False, soft_wrap=True)


def _to_try(job: Job) -> str:
    """A prompt for the shell: one of the run's own where it is short."""
    prompt = next((one.prompt for one in job.texts.drawn), None)
    if prompt is not None and prompt.text.strip() and len(prompt.text) <= LONGEST_HINT and prompt.text.isprintable():
        return shlex.quote(prompt.text)
    return "'The film begins with'" if prompt is None or prompt.context is None else "PROMPT"
