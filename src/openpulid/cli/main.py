"""The command `pulid`.

Nothing heavy is imported before a command runs, so that help and errors appear at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Annotated

import typer

from openpulid import __version__
from openpulid.cli.bench import bench
from openpulid.cli.data import data
from openpulid.cli.doctor import doctor
from openpulid.cli.generate import generate
from openpulid.cli.identify import identify
from openpulid.cli.mini import demo, mini
from openpulid.cli.presets import presets
from openpulid.cli.serve import serve
from openpulid.cli.train import train
from openpulid.cli.tune import tune
from openpulid.cli.verify import verify
from openpulid.cli.web import web
from openpulid.cli.weights import weights
from openpulid.cli.world import world
from openpulid.errors import (
    PulidError,
    escape_unprintable,
    explain_missing_library,
    explain_out_of_memory,
)

OPTION_ALIASES = {
    "id-scale": "scale",
    "weight": "scale",
    "start-at": "start",
    "end-at": "end",
    "attn-mask": "mask",
    "timestep-to-start-cfg": "start-cfg",
    "max-sequence-length": "text-tokens",
    "input-faces-index": "face",
    "input-faces-order": "order",
}
"""Names of options in PuLID's own programs and in ComfyUI's nodes."""


def normalize_option(name: str) -> str:
    """Return the name of an option from another program's name, or with dashes."""
    name = name.replace("_", "-")
    return OPTION_ALIASES.get(name, name)


app = typer.Typer(
    name="pulid",
    context_settings={
        "token_normalize_func": normalize_option,
        "help_option_names": ["-h", "--help"],
    },
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(weights, name="weights")
app.add_typer(presets, name="presets")
app.add_typer(world, name="world")
app.add_typer(mini, name="mini")
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")
app.command()(train)
app.command()(tune)
app.command()(web)
app.command()(serve)
app.command()(doctor)


def print_version(is_requested: bool) -> None:
    """Print the version and exit, for `--version`."""
    if is_requested:
        print(f"pulid {__version__}")
        raise typer.Exit


def print_any_name() -> None:
    """Let stdout take every file name: a name need not be valid text in the terminal's encoding."""
    if isinstance(sys.stdout, TextIOWrapper):
        is_unicode = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_unicode else "backslashreplace")


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Generate images of a person from one photo, without fine-tuning."""


def main() -> None:
    """Run the command. Errors of the user are one sentence on stderr and an exit code."""
    # the libraries' own warnings are for developers
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.simplefilter("ignore", FutureWarning)
    print_any_name()
    try:
        with (
            stop_on_signals(),
            print_warnings(),
            explain_out_of_memory(),
            explain_missing_library(),
        ):
            app()
    except PulidError as error:
        print(f"pulid: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does: what is open is closed and removed."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # with nohup, SIGHUP is ignored
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            previous[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _OneLine(logging.Formatter):
    """Formats a warning as one printable line: it may contain the name of a stranger's file."""

    def format(self, record: logging.LogRecord) -> str:
        return f"pulid: {escape_unprintable(record.getMessage())}"


@contextmanager
def print_warnings() -> Iterator[None]:
    """Print the package's warnings on stderr."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_OneLine())
    logger = logging.getLogger("openpulid")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


app.command()(demo)
app.command()(identify)
app.command(context_settings={"allow_extra_args": True})(generate)
app.command()(verify)


if __name__ == "__main__":
    main()
