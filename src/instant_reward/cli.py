"""The command line: thin, and quick to say what it can do (heavy imports are inside the commands)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from instant_reward import __version__
from instant_reward.types import RunError, UserError

TRAIN_EXAMPLES = """examples:
  instant-reward train recipes/sentiment.yaml
  instant-reward train recipes/sentiment.yaml train.steps=80 algorithm.kl=0.05 --out runs/longer
  instant-reward train recipes/sentiment.yaml --print-config
  instant-reward train --resume runs/longer train.steps=120
"""
FIT_EXAMPLES = """examples:
  instant-reward fit config.yaml                              (texts in the column "text" of the config's data)
  instant-reward fit config.yaml data=reviews.csv train.epochs=2 --out runs/reviews
  instant-reward fit config.yaml data.column=question data.completion=answer
  instant-reward fit --resume runs/reviews
"""
SAMPLE_EXAMPLES = """examples:
  instant-reward sample smollm2-135m "The film begins with" -n 4
  instant-reward sample runs/sentiment "The film begins with"        (with the rewards of the run)
  instant-reward sample smollm2-135m "Once upon a time" --reward my_rewards.py:polite --temperature 0.8
"""
SCORE_EXAMPLES = """examples:
  instant-reward score --reward my_rewards.py:polite reviews.txt      (a text a line; or JSONL with "text")
  instant-reward score --config recipes/sentiment.yaml --coloured reviews.jsonl
  cat reviews.txt | instant-reward score --reward my_rewards.py:polite -
"""
MODELS_EXAMPLES = """examples:
  instant-reward models                      (what has a short name, and where it lies)
  instant-reward models smollm2-135m         (fetches and converts it)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. 0: done; 1: the run itself failed; 2: something the user can mend; 130: stopped by Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options) or 0)
    except RunError as error:
        print(f"instant-reward: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"instant-reward: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("instant-reward: stopped; what was saved before is as it was", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="instant-reward",
        description="Train language models from rewards that arrive while the text is being written.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands, "train", "train a model by a config and report what changed", TRAIN_EXAMPLES)
    _add_train(commands, "fit", "train a model on given texts, which rewards may weigh", FIT_EXAMPLES)
    _add_sample(commands)
    _add_score(commands)
    models = _add(commands, "models", "list the models with a short name, or fetch one", MODELS_EXAMPLES, _models)
    models.add_argument("name", nargs="?", help="fetch this one: a short name, a hub id or a GGUF file")
    return parser


def _add_train(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str, examples: str
) -> None:
    train = _add(commands, name, help_text, examples, _train)
    train.set_defaults(name=name)
    train.add_argument("config", nargs="?", help="a YAML file; left out with --resume, which knows its own")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config, by dotted path")
    train.add_argument("--out", help="the run folder, in place of the config's")
    train.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder")
    train.add_argument("--print-config", action="store_true", help="print the whole config and do nothing else")


def _add_sample(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sample = _add(commands, "sample", "sample texts, coloured by what each word earned", SAMPLE_EXAMPLES, _sample)
    sample.add_argument("model", help="a short name, a folder, a hub id, or a run folder")
    sample.add_argument("prompts", nargs="+", help="what to continue")
    sample.add_argument("-n", "--per-prompt", type=int, default=1, help="texts for each prompt (default 1)")
    sample.add_argument("--reward", action="append", default=[], metavar="MODULE:NAME", help="score them with this")
    sample.add_argument("--max-new-tokens", type=int, default=48)
    sample.add_argument("--min-new-tokens", type=int, default=0)
    sample.add_argument("--temperature", type=float, default=1.0)
    sample.add_argument("--top-p", type=float, default=1.0)
    sample.add_argument("--top-k", type=int, default=0)
    sample.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end a text where it says this")
    sample.add_argument("--guide", type=float, help="so many times Q - V of an ilql run (default: as the run has it)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    sample.add_argument("--jsonl", action="store_true", help="print rollouts with their marks as JSON lines")


def _add_score(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    score = _add(commands, "score", "score finished texts as if they were being written", SCORE_EXAMPLES, _score)
    score.add_argument("file", help="a text a line, JSON lines with text and prompt, or - for standard input")
    score.add_argument("--reward", action="append", default=[], metavar="MODULE:NAME", help="may be given many times")
    score.add_argument("--config", help="take the rewards of this config")
    score.add_argument("--column", default="text", help="the column of a JSONL file that holds the text")
    score.add_argument("--model", help="whose tokenizer cuts tokens; without it a token is a character")
    score.add_argument("--coloured", action="store_true", help="show coloured text in place of JSON lines")


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str, examples: str, run: object
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text.capitalize() + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=run)
    return command


def _train(options: argparse.Namespace) -> int:
    from pathlib import Path

    from instant_reward.config import Config

    path, overrides = options.config, list(options.overrides)
    if path is not None and "=" in path and not Path(path).exists():
        path, overrides = None, [path, *overrides]
    if path is None and options.resume is None:
        raise UserError(f"{options.name}: name a config file, or a run folder with --resume")
    if options.resume is not None and options.out is not None:
        raise UserError(f"{options.name}: --resume goes on in its own folder; leave --out away")
    folder = options.resume or options.out
    supervised = options.name == "fit"
    config = Config.load(path or Path(folder) / "config.yaml", overrides, supervised)
    if folder is not None:
        config = config.model_copy(update={"out": str(folder)})
    if options.print_config:
        print(config.dump(), end="")
        return 0
    from instant_reward.evaluate.session import run_session

    if supervised:
        from instant_reward.supervised import check_supervised

        check_supervised(config)
    return run_session(config, resume=options.resume is not None)


def _sample(options: argparse.Namespace) -> int:
    from instant_reward.evaluate.show import sample_texts

    return sample_texts(options)


def _score(options: argparse.Namespace) -> int:
    from instant_reward.evaluate.show import score_texts

    return score_texts(options)


def _models(options: argparse.Namespace) -> int:
    from instant_reward import models

    if options.name is not None:
        folder = models.locate(options.name)
        source = models.source(folder)
        print(f"{options.name}: {folder} (from {source.get('source', 'a folder')})")
        return 0
    for entry in models.catalogue():
        where = entry.cached or "not fetched yet"
        print(f"{entry.name}  {entry.parameters}  {entry.licence}  from {', or '.join(entry.sources)}  {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
