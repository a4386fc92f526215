"""The trainer: exact resume, average, learning rate, time budget, failures, signals."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from openpulid.errors import OptionError, TrainingError
from openpulid.training import checkpointing, precision
from openpulid.training import trainer as loop
from openpulid.training.checkpointing import Checkpointer
from openpulid.training.trainer import CHECKPOINT, TrainerConfig, run

pytestmark = pytest.mark.usefixtures("both_precisions")


class Regression:
    """A noisy line with dropout and batch norm: everything that could have state between steps."""

    def __init__(self, batch: int = 8, kill_at: int = -1, bad_at: int = -1) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)
        )
        self.batch, self.kill_at, self.bad_at = batch, kill_at, bad_at
        self.seen: dict[int, float] = {}

    def modules(self):
        return {"net": self.net}

    def losses(self, rng):
        if rng.step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(1)
        data = torch.randn(100, 4, generator=generator)
        x = data[rng.indices(100, self.batch)]
        x = rng.record("x", x + 0.1 * rng.randn(x.shape))
        loss = (self.net(x) - x.sum(1, keepdim=True)).float().square().mean()
        loss = loss * float("nan") if rng.step == self.bad_at else loss
        self.seen[rng.step] = loss.item()
        return {"square": loss, "norm": 1e-3 * self.net[0].weight.float().square().mean()}

    def validate(self):
        assert not self.net.training and not torch.is_grad_enabled()
        return {"weight": self.net[0].weight.norm().item()}

    def sheet(self):
        return Image.new("RGB", (8, 8))


SHORT = TrainerConfig(steps=24, lr=1e-2, warmup=4, validate_every=10, log_every=4, ema=0.9)


def test_run_writes_its_directory(tmp_path):
    task = Regression()
    result = run(task, SHORT, tmp_path / "line")
    assert result.steps == 24 and result.losses["square"] < 4 and set(result.metrics) == {"weight"}
    names = {p.name for p in (tmp_path / "line").iterdir()}
    assert {
        CHECKPOINT,
        "history.json",
        "losses.png",
        "sheet-0000010.png",
        "sheet-0000024.png",
    } <= names
    history = json.loads((tmp_path / "line" / "history.json").read_text())
    assert [r["step"] for r in history if "losses" in r] == [4, 8, 12, 16, 20, 24]
    assert all(r["steps_per_second"] > 0 for r in history if "losses" in r and r["step"] > 4)
    assert all(r["gradient_norm"] > 0 for r in history if "losses" in r)
    assert [r["step"] for r in history if "metrics" in r] == [10, 20, 24]
    again = run(Regression(), SHORT, tmp_path / "line")  # already finished
    assert again.steps == 24 and again.metrics == result.metrics


# Forks of one process: its imports take longer than the runs.
KILLED = """
import os, sys
from dataclasses import replace
from openpulid.training import muon, precision
from tests.training.test_trainer import Regression, SHORT, run

status = 0
for optimizer in ("adamw", "muon"):
    for has_bf16 in (True, False):
        child = os.fork()
        if not child:
            for module in (muon, precision):
                module.supports_bf16 = lambda device: has_bf16
            config = replace(SHORT, save_minutes=0.0, optimizer=optimizer)
            run(Regression(kill_at=13), config, f"{sys.argv[1]}/{optimizer}-{has_bf16}")
            os._exit(1)
        status |= os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -9
sys.exit(status)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory, start):
    """Run directories whose process was killed in step 13, by optimizer and precision."""
    folder = tmp_path_factory.mktemp("killed")
    process = start(KILLED, folder)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_run_resumes_bit_for_bit(tmp_path, killed, both_precisions, optimizer):
    schedule = replace(SHORT, optimizer=optimizer)
    undisturbed = Regression()
    run(undisturbed, schedule, tmp_path / "a")
    resumed = Regression()
    with torch.no_grad():
        resumed.net[0].weight.zero_()  # the checkpoint replaces it
    run(resumed, schedule, killed / f"{optimizer}-{both_precisions}")
    assert sorted(resumed.seen) == list(range(13, 24))
    assert all(resumed.seen[s] == undisturbed.seen[s] for s in resumed.seen)
    for name, value in undisturbed.net.state_dict().items():
        assert torch.equal(value, resumed.net.state_dict()[name]), name


def test_validation_and_result_use_the_average(tmp_path):
    task, trace = Regression(), []
    seen = task.validate
    task.validate = lambda: (trace.append(task.net[3].weight.clone()), seen())[1]
    schedule = TrainerConfig(
        steps=3, lr=1e-2, warmup=0, decay=0.01, validate_every=1, ema=0.25, bf16=False
    )
    weights = [task.net[3].weight.detach().clone()]
    losses = task.losses
    task.losses = lambda rng: (weights.append(task.net[3].weight.detach().clone()), losses(rng))[1]
    run(task, schedule, tmp_path)
    average = weights[1]  # the start; decay of update k is min(ema, (1 + k) / (10 + k))
    average = average.lerp(weights[2], 1 - 0.1)
    assert torch.allclose(trace[0], average)
    assert torch.allclose(trace[1], average.lerp(weights[3], 1 - 2 / 11))
    assert torch.equal(task.net[3].weight, trace[2])


def test_learning_rate_warms_up_holds_and_decays():
    schedule = TrainerConfig(steps=100, lr=1.0, warmup=10, decay=0.2)
    factors = [schedule.lr_factor(s, 100) for s in range(100)]
    assert (
        factors[0] == 0.1
        and factors[9:81] == [1.0] * 72
        and factors[90] == 0.5
        and factors[99] == 0.05
    )
    assert not schedule.is_decaying(79, 100) and schedule.is_decaying(80, 100)


def timed_task(monkeypatch, step_seconds):
    """A task whose step k takes `step_seconds(k)`, and the clock that the trainer reads."""
    clock = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    task = Regression()
    losses = task.losses

    def timed(rng):
        clock[0] += step_seconds(rng.step)
        return losses(rng)

    task.losses = timed
    return task, clock


@pytest.mark.parametrize(("slower", "steps"), [(1.0, range(298, 303)), (2.0, range(170, 220))])
def test_time_budget_shortens_the_run_and_completes_the_decay(tmp_path, monkeypatch, slower, steps):
    # a step takes 0.1 s, from step 100 on `slower` times as long
    task, _ = timed_task(monkeypatch, lambda step: 0.1 * (slower if step >= 100 else 1.0))
    schedule = TrainerConfig(steps=100_000, lr=1e-2, validate_every=40)
    result = run(task, schedule, tmp_path, minutes=0.5)
    assert result.steps in steps and result.seconds < 33
    rates = [r["lr"] for r in json.loads((tmp_path / "history.json").read_text()) if "lr" in r]
    assert rates[-1] < 0.05 * max(rates)
    again = run(Regression(), schedule, tmp_path, minutes=0.5)  # the planned end is kept
    assert again.steps == result.steps


def test_slow_first_steps_do_not_shorten_the_run(tmp_path, monkeypatch):
    # four times as slow for 35 steps, in which the first estimate is made
    task, _ = timed_task(monkeypatch, lambda step: 0.4 if step < 35 else 0.1)
    result = run(
        task, TrainerConfig(steps=100_000, lr=1e-2, validate_every=1000), tmp_path, minutes=0.5
    )
    assert result.steps in range(190, 200) and result.seconds == pytest.approx(30, abs=0.5)


def test_linear_decay_from_the_first_step_fits_the_budget(tmp_path, monkeypatch):
    task, _ = timed_task(monkeypatch, lambda _: 0.1)
    schedule = TrainerConfig(steps=100_000, lr=1e-2, validate_every=1000, decay=1.0)
    result = run(task, schedule, tmp_path, minutes=0.5)
    assert result.steps in range(299, 302) and result.seconds == pytest.approx(30, abs=0.3)


def test_checkpoints_count_in_the_budget(tmp_path, monkeypatch):
    """A step takes 0.1 s, and a checkpoint 2 s after every 6 s: steps have two thirds."""
    task, clock = timed_task(monkeypatch, lambda _: 0.1)
    save = Checkpointer.save

    def save_slowly(*args):
        clock[0] += 2.0
        save(*args)

    monkeypatch.setattr(Checkpointer, "save", save_slowly)
    schedule = TrainerConfig(
        steps=100_000, lr=1e-2, validate_every=100, decay=0.6, save_minutes=0.1
    )
    result = run(task, schedule, tmp_path, minutes=1)
    assert result.steps in range(360, 410) and result.seconds == pytest.approx(60, abs=3)


def test_steps_that_compile_do_not_shorten_a_run_that_soon_decays(tmp_path, monkeypatch):
    # two of the first steps take 5 s
    task, _ = timed_task(monkeypatch, lambda step: 5.0 if step in (14, 20) else 0.1)
    schedule = TrainerConfig(steps=100_000, lr=1e-2, validate_every=1000, decay=0.9)
    result = run(task, schedule, tmp_path, minutes=0.5)
    assert result.steps in range(200, 204) and result.seconds == pytest.approx(30, abs=0.5)


def slow_validations(monkeypatch, seconds):
    """A task whose steps take 0.1 s, and its validations so long."""
    task, clock = timed_task(monkeypatch, lambda _: 0.1)
    validate = task.validate

    def slow():
        clock[0] += seconds
        return validate()

    task.validate = slow
    return task


def test_validation_before_the_decay_does_not_end_the_run(tmp_path, monkeypatch):
    task = slow_validations(monkeypatch, 5.0)
    # 300 steps fit at first, and the decay would begin at 240: one step after the validation
    result = run(
        task, TrainerConfig(steps=100_000, lr=1e-2, validate_every=238), tmp_path, minutes=0.5
    )
    assert result.steps in range(295, 303)


def test_estimate_separates_steps_and_validations(tmp_path, monkeypatch):
    task = slow_validations(monkeypatch, 3.0)
    # (60 - 3) / (0.1 + 3 / 100) steps fit; validations must not count as slow steps
    result = run(
        task,
        TrainerConfig(steps=100_000, lr=1e-2, validate_every=100, decay=0.5),
        tmp_path,
        minutes=1,
    )
    assert result.steps in range(435, 450) and result.seconds == pytest.approx(60, abs=1.5)


def test_non_finite_loss_stops_and_saves_its_batch(tmp_path):
    task = Regression(bad_at=17)
    with pytest.raises(TrainingError, match=r"step 17.*square nan"):
        run(task, SHORT, tmp_path)
    with safe_open(tmp_path / "not-finite-step-17-rank-0.safetensors", framework="pt") as file:
        assert file.get_tensor("batch.x").shape == (8, 4) and file.get_tensor(
            "batch.data.indices"
        ).shape == (8,)
        assert torch.isfinite(file.get_tensor("weights.net.0.weight")).all()
        assert json.loads(file.metadata()["facts"])["step"] == 17
    fixed = Regression()
    assert run(fixed, SHORT, tmp_path).steps == 24


def test_full_disk_preserves_the_last_checkpoint(tmp_path, monkeypatch):
    run(Regression(), TrainerConfig(steps=5, lr=1e-2), tmp_path)
    good = (tmp_path / CHECKPOINT).read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing, "save_file", full)
    with pytest.raises(TrainingError, match="No space left"):
        run(Regression(), TrainerConfig(steps=10, lr=1e-2, save_minutes=0.0), tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == good
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signal_saves_and_stops(tmp_path, number, error):
    class Stopped(Regression):
        def losses(self, rng):
            if rng.step == 6:
                os.kill(os.getpid(), number)
            return super().losses(rng)

    before = signal.getsignal(number)
    with pytest.raises(error):
        run(Stopped(), SHORT, tmp_path)
    assert signal.getsignal(number) is before
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        assert json.loads(file.metadata()["facts"])["progress"]["step"] == 7


def test_signal_in_the_last_step_keeps_the_validation(tmp_path):
    class Stopped(Regression):
        def losses(self, rng):
            if rng.step == SHORT.steps - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().losses(rng)

    with pytest.raises(SystemExit):
        run(Stopped(), SHORT, tmp_path)
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        assert json.loads(file.metadata()["facts"])["progress"]["step"] == 24
    for _ in range(2):  # the second run is already finished
        resumed = Regression()
        result = run(resumed, SHORT, tmp_path)
        history = json.loads((tmp_path / "history.json").read_text())
        assert [r["step"] for r in history if "metrics" in r] == [10, 20, 24]
        assert result.steps == 24 and not resumed.seen
    assert result.metrics == {"weight": pytest.approx(resumed.net[0].weight.norm().item())}


def test_other_runs_and_invalid_settings_raise(tmp_path):
    run(Regression(), TrainerConfig(steps=3, lr=1e-2), tmp_path)
    with pytest.raises(TrainingError, match="seed 0, not 1"):
        run(Regression(), TrainerConfig(steps=3, lr=1e-2, seed=1), tmp_path)
    named = TrainerConfig(steps=3, lr=1e-2, name="stage1")
    run(Regression(), named, tmp_path / "named")
    with pytest.raises(TrainingError, match="a run of stage1, not of stage2"):
        run(Regression(), replace(named, name="stage2"), tmp_path / "named")
    continued = TrainerConfig(steps=3, lr=1e-2, inputs={"--base": "12", "--begin": "34"})
    run(Regression(), continued, tmp_path / "continued")
    for inputs in ({"--base": "12", "--begin": "56"}, {"--base": "12"}):
        with pytest.raises(TrainingError, match="is a run with another --begin: use the same"):
            run(Regression(), replace(continued, inputs=inputs), tmp_path / "continued")
    run(Regression(), continued, tmp_path / "continued")
    other = Regression()
    other.net[0] = nn.Linear(4, 9)
    with pytest.raises(TrainingError, match="another model"):
        run(other, TrainerConfig(steps=3, lr=1e-2), tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="not a checkpoint"):
        run(Regression(), TrainerConfig(steps=3, lr=1e-2), tmp_path)
    for minutes in (0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="minutes must be a positive number"):
            run(Regression(), TrainerConfig(steps=3, lr=1e-2), tmp_path, minutes=minutes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"seed": 10**400}, "seed must be a whole number"),
        ({"lr": float("nan")}, "lr must be a number from 0, got nan"),
        ({"lr": float("inf")}, "lr must be a number"),
        ({"lr": "1e-3"}, "lr must be a number"),
        ({"ema": 1.5}, "ema must be a number from 0 to 1"),
        ({"optimizer": "sgd"}, "optimizer must be adamw or muon, got 'sgd'"),
    ],
)
def test_impossible_settings_raise(change, message):
    with pytest.raises(OptionError, match=message):
        replace(SHORT, **change)


def test_deferred_finite_check_skips_bad_updates(tmp_path, monkeypatch):
    """On an accelerator the check is read every few steps; until then updates are skipped."""
    task = Regression(bad_at=17)
    monkeypatch.setattr(precision, "can_defer", lambda device: True)
    schedule = TrainerConfig(
        steps=24, lr=1e-2, warmup=4, log_every=24, validate_every=100, bf16=False
    )
    with pytest.raises(TrainingError, match="step 17"):
        run(task, schedule, tmp_path)
    with safe_open(tmp_path / "not-finite-step-17-rank-0.safetensors", framework="pt") as file:
        assert torch.isfinite(file.get_tensor("weights.net.0.weight")).all()
    assert max(task.seen) > 17


class TwoPasses(Regression):
    """The same task with a backward pass for each loss, and a metric."""

    def backward_losses(self, rng, backward):
        losses = self.losses(rng)
        square = losses["square"]
        backward({"square": square}, {"double": 2 * square.detach()})
        backward({"norm": losses["norm"]})


def test_several_backward_passes_match_a_single_one(tmp_path):
    single = Regression()
    separate = TwoPasses()
    expected = run(single, SHORT, tmp_path / "single")
    result = run(separate, SHORT, tmp_path / "separate")
    assert result.losses["double"] == pytest.approx(2 * result.losses["square"])
    for name, value in expected.losses.items():
        assert result.losses[name] == pytest.approx(value, rel=1e-4)
    torch.testing.assert_close(separate.net[0].weight, single.net[0].weight, rtol=1e-4, atol=1e-5)


def test_checkpoint_of_another_version_raises(tmp_path):
    run(Regression(), TrainerConfig(steps=3, lr=1e-2), tmp_path)
    tensors = load_file(tmp_path / CHECKPOINT)
    checkpointing.write_tensors(tmp_path / CHECKPOINT, tensors, {"step": 3})
    with pytest.raises(TrainingError, match="another version"):
        run(Regression(), TrainerConfig(steps=3, lr=1e-2), tmp_path)
