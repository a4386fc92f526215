"""The command `pulid`: arguments in, parts wired, one plain sentence where something is wrong.

Nothing heavy is imported before a command runs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openpulid.errors import OptionError, PulidError

if TYPE_CHECKING:
    from PIL import Image

    from openpulid.identity.identity import Identity
    from openpulid.studio import Studio


def _known_device(name: str | None) -> str | None:
    """Found out before anything is loaded."""
    if name is not None:
        import torch

        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError, NotImplementedError):
            raise OptionError(f"there is no device {name!r} here; without --device the best is taken.") from None
    return name


Folder = Annotated[Path, typer.Option("--out", "-o", help="Where the results go; made when missing.")]
Device = Annotated[str | None, typer.Option(callback=_known_device, help="Where to compute, such as cpu; the best by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Nothing but the last line, as JSON.")]
Preset = Annotated[str, typer.Option(help="The model: mini, or a folder.")]

app = typer.Typer(
    name="pulid",
    help="Put a person into any image a diffusion model can make, from one photo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
world = typer.Typer(help="Procedural people: pictures to start from.", no_args_is_help=True)
mini = typer.Typer(help="The miniature: train it from nothing, measure it.", no_args_is_help=True)
bench = typer.Typer(help="What things cost.", no_args_is_help=True)
app.add_typer(world, name="world")
app.add_typer(mini, name="mini")
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point. What a user can put right is one sentence on stderr and an exit code, no traceback."""
    # The libraries' own notes are for those who write programs with them.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.simplefilter("ignore", FutureWarning)
    try:
        app()
    except PulidError as error:
        print(f"pulid: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@app.command()
def demo(
    out: Folder = Path("demo"),
    people_seed: Annotated[int, typer.Option(min=0, help="Which of the people nobody trained on.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """A person nobody trained on, from one picture into several new ones."""
    from openpulid.mini import demo as show

    outcome = show.run(_folder(out), people_seed=people_seed, device=device, say=_silent if as_json else _say)
    if not as_json:
        print(f"{outcome.picture}\n{outcome.page}")
    _last_line(outcome.figures)


@app.command()
def identify(
    picture: Annotated[list[str], typer.Argument(help="One or several pictures of one person.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The identity file to write (.safetensors).")],
    preset: Preset = "mini",
    device: Device = None,
) -> None:
    """Picture to identity: a file to use again and again. It is biometric data: only you can read it."""
    if out.suffix != ".safetensors":
        raise OptionError(f"{out}: an identity file ends with .safetensors, such as {out.stem}.safetensors.")
    for name in picture:
        _check_picture(name)
    identity = _studio(preset, device).identify(picture)
    _folder(out.parent)
    identity.save(out)
    print(out)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    who: Annotated[str | None, typer.Option("--id", help="Identity file or picture of the person.")] = None,
    preset: Preset = "mini",
    out: Folder = Path("."),
    num: Annotated[int, typer.Option(min=1, help="How many images.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first image's seed; image k has seed + k.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; the preset's by default.")] = None,
    scale: Annotated[float | None, typer.Option(min=0, help="How strongly the identity acts; 0 is not at all.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="How strongly the prompt acts.")] = None,
    negative: Annotated[str, typer.Option(help="What not to show.")] = "",
    device: Device = None,
) -> None:
    """Prompt and identity to images, as PNG with the full request inside."""
    saved = _identity(who) if who and who.endswith(".safetensors") else None
    if who and not saved:
        _check_picture(who)
    folder = _folder(out)
    studio = _studio(preset, device)
    identity = saved or (studio.identify(who) if who else None)
    result = studio.generate(
        prompt,
        identity,
        seed=seed,
        num_images=num,
        negative=negative,
        steps=steps,
        guidance=guidance,
        scale=scale,
    )
    request: dict[str, Any] = {"prompt": prompt, "negative": negative, "id": who, "preset": preset}
    request |= {"steps": steps, "guidance": guidance, "scale": scale}
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:48].strip("-") or "image"
    for k, image in enumerate(result.images):
        path = folder / f"{words}-{seed + k}.png"
        _save(image, path, {**request, "seed": seed + k})
        print(path)


@world.command()
def person(
    seed: Annotated[int, typer.Option(min=0, help="Who; from 1000000 on nobody trained on them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write.")],
    size: Annotated[int, typer.Option(min=32, max=1024, help="Pixels; 96 is what the miniature knows.")] = 96,
) -> None:
    """One picture of one procedural person: something to start from."""
    from openpulid.mini.showcase import portrait

    _save(portrait(seed, size), _file(out))
    print(out)


@world.command()
def sheet(
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write.")],
    seed: Annotated[int, typer.Option(min=0, help="The first person.")] = 0,
    size: Annotated[int, typer.Option(min=32, max=512, help="Pixels of each picture.")] = 160,
) -> None:
    """Eight people in eight scenes: one person along each row."""
    from openpulid.mini.showcase import people_sheet

    _save(people_sheet(seed, size), _file(out))
    print(out)


@world.command()
def words() -> None:
    """What a prompt for the miniature can say: each thing and its kinds, then every single word."""
    from openpulid.world import ATTRIBUTES, VOCABULARY

    for name, kinds in ATTRIBUTES.items():
        print(f"{name.replace('_', ' ')}: {', '.join(kinds)}")
    print(f"\n{' '.join(word for word in VOCABULARY if word.isalpha())}")


@mini.command()
def build(
    part: Annotated[list[str] | None, typer.Argument(help="Parts in order; all by default.")] = None,
    minutes: Annotated[float | None, typer.Option(help="For all of them together.")] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Continue what was begun, or begin again.")] = True,
) -> None:
    """Train the miniature from nothing; a build that was stopped goes on where it was."""
    from openpulid.mini import build as builder

    builder.build(part or None, minutes=minutes, device=device, fresh=not resume)


@mini.command()
def evaluate(
    people: Annotated[int, typer.Option(min=2, help="How many people nobody trained on.")] = 64,
    people_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts for each.")] = 4,
    preset: Annotated[str, typer.Option(help="mini, or mini-lightning for four steps.")] = "mini",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the miniature on people and prompts that no training has seen."""
    from openpulid.mini import evaluate as measure

    bar = measure.silent if as_json else measure.progress
    table = measure.run(people, people_seed=people_seed, prompts=prompts, preset=preset, device=device, progress=bar)
    if not as_json:
        measure.show(table)
    _last_line(measure.as_json(table))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Such as mini_stage1.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's folder; runs/RECIPE by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; the recipe's by default.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after about this long, with the tail done.")] = None,
    device: Device = None,
    begin: Annotated[Path | None, typer.Option(help="The adapter to start from, where the recipe continues one.")] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Continue what was begun, or begin again.")] = True,
) -> None:
    """Train an adapter by a named recipe."""
    from openpulid.training.recipe import find

    chosen = find(recipe)
    from openpulid.mini import adapter

    folder = out or Path("runs") / recipe
    adapter.train(chosen, folder, steps=steps, minutes=minutes, device=device, fresh=not resume, begin=begin)


@bench.command("train")
def bench_train(
    base: Annotated[str, typer.Option(help="mini or sdxl, at full size.")] = "mini",
    random: Annotated[bool, typer.Option("--random", help="Random weights: a step costs the same with any.")] = False,
    recipe: Annotated[str | None, typer.Option(help="BASE_stage3 by default.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures of the diffusion branch; the recipe's by default.")] = None,
    fast_batch: Annotated[int | None, typer.Option(min=1, help="Pictures of each pair of the lightning branch.")] = None,
    pixels: Annotated[int | None, typer.Option(help="Width of the lightning branch's pictures.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each candidate, by turns.")] = 5,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time and memory of a training step, with gradients through the last 1 to 4 steps, kept or computed again."""
    from dataclasses import asdict, replace

    import torch

    from openpulid.bench import training

    if not random:
        raise OptionError("a step costs the same with any weights; say --random, and none are looked for.")
    from openpulid.loading import best_device
    from openpulid.training.recipe import find

    chosen = torch.device(device) if device else best_device()
    known = find(recipe or f"{base}_stage3")
    sizes: dict[str, Any] = {"batch": batch, "fast_batch": fast_batch, "pixels": pixels}
    known = replace(known, **{name: value for name, value in sizes.items() if value})
    dtype = torch.float32 if base == "mini" else torch.bfloat16
    task = training.random_task(known, training.random_base(base, chosen, dtype))
    costs = training.measure(task, rounds=rounds, on_progress=None if as_json else _counted)
    facts = {"base": base, "recipe": known.name, "batch": known.batch, "fast_batch": known.fast_batch, "device": str(chosen)}
    if not as_json:
        training.show(costs)
    _last_line({**facts, "rows": [asdict(cost) for cost in costs]})


def _studio(preset: str, device: str | None) -> Studio:
    from openpulid.studio import load

    return load(preset, device=device)


def _identity(path: str) -> Identity:
    from openpulid.identity.identity import Identity

    return Identity.load(path)


def _check_picture(path: str) -> None:
    """A file that is no picture is found out at once, before any model is loaded."""
    from openpulid.images import open_picture

    open_picture(path)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{path}: cannot be used as a folder ({error.strerror}); choose another with -o.") from None
    return path


def _file(path: Path) -> Path:
    _folder(path.parent)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise OptionError(f"{path}: name a picture, such as {path.stem or 'picture'}.png.")
    return path


def _save(image: Image.Image, path: Path, request: Mapping[str, Any] | None = None) -> None:
    """Write a picture; a PNG carries the request that made it under "openpulid", as JSON."""
    from PIL.PngImagePlugin import PngInfo

    extra: dict[str, Any] = {}
    if request is not None:
        extra["pnginfo"] = PngInfo()
        extra["pnginfo"].add_itxt("openpulid", json.dumps(request, ensure_ascii=False))
    try:
        image.save(path, **extra)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written ({error.strerror or error}).") from None


def _counted(done: int, total: int) -> None:
    print(f"\r{done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def _last_line(figures: Mapping[str, Any]) -> None:
    print(json.dumps(figures), flush=True)


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text)


def _silent(text: str) -> None:
    """For those who asked for JSON alone."""


if __name__ == "__main__":
    main()
