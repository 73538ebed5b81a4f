"""The program: which verbs there are, and what becomes of their errors.

Exit codes: 0 done; 2 the user's mistake, said in one line on standard error; 130 interrupted; 1 our own failure, with
its traceback. Results go to standard output (one JSON object with --json), everything else to standard error. The
heavy imports happen inside the commands: `pylumiere --help` loads no torch.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys

import typer

from pylumiere.cli.bench import bench_e2e, bench_model, bench_ops, bench_plan
from pylumiere.cli.bundles import export_model, inspect_model, make_keys, verify_bundle
from pylumiere.cli.doctor import doctor
from pylumiere.cli.generate import generate, upscale
from pylumiere.cli.importing import import_source
from pylumiere.cli.serve import serve, serve_key
from pylumiere.errors import USER_ERRORS

# Names in a request's errors, and what the user typed for them.
_OPTIONS = {
    "negative_prompt": "--negative", "num_frames": "--frames", "height": "--size (height)", "width": "--size (width)",
    "num_inference_steps": "--steps", "guidance_scale": "--guidance", "window_frames": "--window",
    "window_overlap": "--overlap",
    "style_strength": "--style-strength", "temporal_shift": "--temporal-shift",
    "memory_budget": "--memory-budget",
    **{name: f"--{name}" for name in ("fps", "seed", "sampler", "image", "video", "mask", "strength")},
    **{name: f"--{name}" for name in ("keyframes", "expand", "fit", "style", "lora", "loop")},
}  # fmt: skip


class _Interrupted(Exception):
    """Ctrl-C or SIGTERM, in a form that Typer does not answer itself."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code


class _Terminated(KeyboardInterrupt):
    """SIGTERM: clean up as after Ctrl-C."""


def _interruptible(command):
    @functools.wraps(command)
    def run(*arguments, **options):
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt as error:
            raise _Interrupted(143 if isinstance(error, _Terminated) else 130) from error

    return run


app = typer.Typer(
    name="pylumiere",
    help="Text to video by a Space-Time U-Net.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(no_args_is_help=True)
app.add_typer(bench, name="bench", help="Measurements on this machine.")

# In the order of the help.
for _name, _verb in {
    "generate": generate,
    "upscale": upscale,
    "doctor": doctor,
    "serve": serve,
    "serve-key": serve_key,
    "import": import_source,
    "export": export_model,
    "inspect": inspect_model,
    "verify": verify_bundle,
    "keygen": make_keys,
}.items():
    app.command(_name)(_interruptible(_verb))
for _name, _verb in {"ops": bench_ops, "model": bench_model, "e2e": bench_e2e, "plan": bench_plan}.items():
    bench.command(_name)(_interruptible(_verb))


def _on_sigterm(number, frame):
    raise _Terminated


def _explain(error: BaseException) -> str:
    """A user's error in one line, in the names that were typed."""
    names = "|".join(_OPTIONS)
    text = " ".join(str(error).split())
    return re.sub(rf"(^|; |, )({names})(?=[=:])", lambda match: match[1] + _OPTIONS[match[2]], text)


def _spread(arguments: list[str]) -> list[str]:
    """`--keyframes A B` as `--keyframes A --keyframes B`: an option with several values, which click does not know."""
    spread: list[str] = []
    values = -1  # that the option has had; -1: another option
    for argument in arguments:
        if values >= 0 and (values == 0 or re.match(r"(-?\d+|first|last):", argument)):
            spread += ["--keyframes", argument]
            values += 1
        elif argument == "--keyframes":
            values = 0
        else:
            spread.append(argument)
            values = -1
    return spread + ["--keyframes"] * (values == 0)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _on_sigterm)
    arguments = _spread(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(arguments, prog_name="pylumiere", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except USER_ERRORS as error:
        return _fail(_explain(error))
    except _Interrupted as error:
        print("pylumiere: interrupted; nothing was written", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # Typer's usage errors share no public base over its versions
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 2
        if hasattr(error, "format_message"):
            return _fail(" ".join(error.format_message().split()))
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nobody to tell
            return 0
        raise


def _fail(text: str) -> int:
    print(f"pylumiere: {text}", file=sys.stderr)
    return 2
