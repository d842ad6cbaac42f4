"""The command ``dtype-doctor``.

    dtype-doctor run --checkpoint fp32 --dtype auto     carry out a LoadPlan here and say what came
    dtype-doctor env                                    is this machine ready for the guide

``run --json`` prints the whole Outcome, so that one Python environment can ask another.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import fields

from helpers import checkpoints, machine
from helpers.errors import CheckpointError, PlanError
from helpers.plan import ATTENTION, AUTOCAST, DEFAULT_DTYPES, DTYPES, KEYWORDS, LoadPlan
from helpers.steps import STEPS


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of ``run``: 0 it works, 1 it fails or its logits are not finite, 2 not run."""
    given = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The signs of a verdict are not in every console's alphabet.
        sys.stdout.reconfigure(errors="replace")
    if given.command == "env":
        return 0 if machine.report() else 1
    plan = LoadPlan(**{field.name: getattr(given, field.name) for field in fields(LoadPlan)})
    return _run(plan, given.json)


def _run(plan: LoadPlan, as_json: bool) -> int:
    from helpers.experiment import run
    from helpers.view import Card

    try:
        outcome = run(plan)
    except (PlanError, CheckpointError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(outcome.to_json() if as_json else Card(outcome))
    return 0 if outcome.ok and outcome.finite else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dtype-doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="is this machine ready for the guide")
    run = commands.add_parser("run", help="carry out a LoadPlan and say what came of it")
    default = LoadPlan()
    run.add_argument(
        "--checkpoint",
        default=default.checkpoint,
        help=f"{', '.join(checkpoints.available())}, a folder, or a hub id",
    )
    run.add_argument("--dtype", default=default.dtype, choices=DTYPES)
    run.add_argument("--keyword", default=default.keyword, choices=KEYWORDS)
    run.add_argument("--default-dtype", choices=DEFAULT_DTYPES[1:])
    run.add_argument("--attention", default=default.attention, choices=ATTENTION)
    run.add_argument("--autocast", choices=AUTOCAST[1:])
    run.add_argument("--adapter", help="the folder of a LoRA adapter")
    run.add_argument(
        "--after-load", nargs="*", default=(), choices=STEPS, help="steps, in their order"
    )
    run.add_argument("--question", default=default.question)
    run.add_argument("--json", action="store_true", help="print the whole Outcome as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
