"""Train the miniature on one accelerator, from rendering to adapters, in a given time.

    python -m openpulid.mini.accelerated --device cuda --seconds 450 -o OUT

Every stage writes its results to OUT at once. A stage that fails is reported, and the later stages
use the weights of the package, so that one error does not cost the complete run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from openpulid.device import select_device
from openpulid.mini.accelerated import adapter, stages
from openpulid.mini.accelerated.output import Output
from openpulid.mini.accelerated.state import SMALL, RunState, Sizes
from openpulid.pipelines.presets import MINIATURE

STAGES = ("autoencoder", "base", "student", *adapter.TIME_FRACTIONS)
DEFAULT_STAGES = "autoencoder,base,student"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="where to compute")
    parser.add_argument(
        "--seconds", type=float, default=450.0, help="duration of the run, including imports"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="output folder")
    parser.add_argument(
        "--weights", type=Path, default=MINIATURE, help="folder of the models that are not trained"
    )
    parser.add_argument(
        "--stages",
        default=DEFAULT_STAGES,
        help=f"comma-separated list of {', '.join(STAGES)}; they run in this order",
    )
    parser.add_argument(
        "--adapter-seconds",
        type=float,
        default=0.0,
        help="part of --seconds that is reserved for stage1 to stage3",
    )
    parser.add_argument("--people", type=int, help="number of rendered people, six images each")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a dry run on a CPU")
    parser.add_argument(
        "--no-compile", action="store_true", help="neither compile nor capture the steps"
    )
    parser.add_argument(
        "--compile-renderer", action="store_true", help="saves a minute above 500,000 images"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    names = options.stages.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}: choose from {', '.join(STAGES)}.")
    sizes = SMALL if options.small else Sizes()
    if options.people:
        sizes = replace(sizes, people=options.people)
    torch.manual_seed(5)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    train(
        RunState(
            device=select_device(options.device),
            out=Output(options.out),
            weights=options.weights,
            seconds=options.seconds,
            sizes=sizes,
            stages=tuple(name for name in STAGES if name in names),
            adapter_seconds=options.adapter_seconds,
            is_compiled=not options.no_compile,
            compile_renderer=options.compile_renderer,
        )
    )


def train(run: RunState) -> None:
    """Run the stages in order. A stage that fails is reported, and the next one is run."""
    out = run.out
    out.log(
        f"{run.device}, torch {torch.__version__}, {os.cpu_count()} cores; "
        f"stages {', '.join(run.stages)}"
    )
    if run.device.type == "cuda":
        out.log(torch.cuda.get_device_name(run.device))
    try:
        _train_stages(run)
    finally:
        run.probe.stop()
        out.report["probe"] = run.probe.status
        if run.device.type == "cuda":
            out.log(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        out.log("done")
        out.write()


def _train_stages(run: RunState) -> None:
    out = run.out
    stages.prepare(run)
    out.attempt("evaluation of the shipped base", lambda: stages.evaluate_shipped(run))
    if "autoencoder" in run.stages:
        out.attempt("autoencoder", lambda: stages.train_autoencoder(run))
    stages.encode(run)
    if "base" in run.stages:
        succeeded = out.attempt("base", lambda: stages.train_base(run))
        if not succeeded and run.seconds_left > 0.3 * run.main_seconds:
            run.is_compiled = False
            out.attempt("base without compiling", lambda: stages.train_base(run))
    if "student" in run.stages and ("base" not in run.stages or run.unet is not None):
        out.attempt("student", lambda: stages.train_student(run))
    has_adapter_stage = any(name in run.stages for name in adapter.TIME_FRACTIONS)
    if has_adapter_stage and run.seconds_left > 0.08 * run.seconds:
        out.attempt("adapters", lambda: adapter.train_stages(run))


if __name__ == "__main__":
    main()
