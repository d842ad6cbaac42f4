"""The command ``dtype-doctor``.

    dtype-doctor run --checkpoint fp32 --dtype auto     carry out a LoadPlan here and say what came
    dtype-doctor xray Qwen1.5-72B --dtype float32       show where float32 comes in, without weights
    dtype-doctor env                                    is this machine ready for the guide

``run --json`` prints the whole Outcome, so that one Python environment can ask another.
"""

import argparse
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import fields

from helpers import checkpoints, machine
from helpers.errors import CheckpointError, PlanError
from helpers.plan import ATTENTION, AUTOCAST, DEFAULT_DTYPES, DTYPES, HALF, KEYWORDS, LoadPlan
from helpers.steps import STEPS
from helpers.subjects import EXPECTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of ``run``: 0 it works, 1 it fails or its logits are not finite, 2 not run."""
    given = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The signs of a verdict are not in every console's alphabet.
        sys.stdout.reconfigure(errors="replace")
    if given.command == "env":
        return 0 if machine.report() else 1
    if given.command == "xray":
        return _xray(given)
    plan = LoadPlan(**{field.name: getattr(given, field.name) for field in fields(LoadPlan)})
    return _run(plan, given.json)


def _run(plan: LoadPlan, as_json: bool) -> int:
    from helpers.experiment import run
    from helpers.view import Card, verdict

    try:
        outcome = run(plan)
    except (PlanError, CheckpointError, RuntimeError) as error:
        print(_as_typed(str(error)), file=sys.stderr)
        return 2
    print(outcome.to_json() if as_json else Card(outcome))
    return 0 if verdict(outcome).state == "good" else 1


def _xray(given: argparse.Namespace) -> int:
    from helpers.gate import xray

    asked = {"lora": given.lora, "norms_float": given.norms}
    try:
        found = xray(
            given.model,
            dtype=given.dtype,
            autocast=given.autocast,
            after_load=tuple(step for step, wanted in asked.items() if wanted),
            decode=given.decode,
            trust_remote_code=given.trust_remote_code,
        )
    except (PlanError, CheckpointError, RuntimeError) as error:
        print(_as_typed(str(error)), file=sys.stderr)
        return 2
    print(found.to_json() if given.json else repr(found))
    return {True: 0, False: 1, None: 2}[found.ok]


def _as_typed(message: str) -> str:
    """A message that names fields of a LoadPlan, with the names of the options."""
    names = "|".join(field.name for field in fields(LoadPlan))
    return re.sub(
        rf"\b({names})(?==| has\b)", lambda found: f"--{found[1].replace('_', '-')}", message
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dtype-doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="is this machine ready for the guide")
    steps = "\n".join(f"  {name:13}{step.what}" for name, step in STEPS.items())
    run = commands.add_parser(
        "run",
        help="carry out a LoadPlan and say what came of it",
        description="Load a checkpoint as told, let it answer, and say what came of it.",
        epilog=f"steps of --after-load:\n{steps}\n\n"
        "exit status: 0 it works, 1 it fails or its logits are not finite, 2 it was not run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = LoadPlan()
    known = f"{', '.join(checkpoints.available())}, a folder, or a hub id"
    run.add_argument("--checkpoint", default=default.checkpoint, help=known)
    for name, choices, what in (
        ("dtype", DTYPES, "dtype= of from_pretrained (omitted: left out, the default)"),
        ("keyword", KEYWORDS, "what that argument is called (default: dtype)"),
        ("default_dtype", DEFAULT_DTYPES, "torch.set_default_dtype around the load"),
        ("attention", ATTENTION, "attn_implementation= (default: flash_attention_2)"),
        ("autocast", AUTOCAST, "the dtype of torch.autocast around forward and generate"),
    ):
        run.add_argument(
            f"--{name.replace('_', '-')}",
            default=getattr(default, name),
            choices=[choice for choice in choices if choice is not None],
            help=what,
        )
    run.add_argument("--adapter", help="the folder of a LoRA adapter to put on the model")
    run.add_argument(
        "--after-load",
        nargs="*",
        default=(),
        choices=STEPS,
        help="what is done after the load, in this order",
    )
    run.add_argument("--question", default=default.question, help="what the model is asked")
    run.add_argument("--json", action="store_true", help="print the whole Outcome as JSON")
    look = commands.add_parser(
        "xray",
        help="show where float32 comes in, by the config alone",
        description="Build a model at its own size without its weights, run its forward, and show"
        " the dtypes on the way to FlashAttention.",
        epilog="exit status: 0 it passes, 1 it fails, 2 it could not be told",
    )
    look.add_argument("model", help=EXPECTED)
    look.add_argument("--dtype", choices=DTYPES, help="dtype= of from_pretrained")
    look.add_argument("--autocast", choices=HALF, help="the dtype of torch.autocast around forward")
    look.add_argument("--lora", action="store_true", help="with a LoRA adapter")
    look.add_argument(
        "--norms", choices=["float32"], help="cast every norm, as k-bit training does"
    )
    look.add_argument(
        "--decode", action="store_true", help="the token after the prompt, with cache"
    )
    look.add_argument(
        "--trust-remote-code", action="store_true", help="let code of the checkpoint run"
    )
    look.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
