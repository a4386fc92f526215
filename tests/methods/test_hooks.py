"""Schedule positions, spans and the step tracker."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openpulid.errors import OptionError
from openpulid.methods.controlnet import ControlNet
from openpulid.methods.hooks import PipelineState, SchedulePosition, Span, StepTracker, check_scale
from openpulid.methods.ip_adapter.faceid import FaceID
from tests.support.token_files import controlnet, generate, person, published


def test_step_tracker_counts_steps_and_negative_calls() -> None:
    tracker, positions = StepTracker(), []
    for time in (1.0, 0.7, 0.7, 0.3, 0.3, 1.0, 0.5):
        tracker.update(time)
        positions.append((tracker.step, tracker.is_negative))
    assert positions == [
        (0, False),
        (1, False),
        (1, True),
        (2, False),
        (2, True),
        (0, False),
        (1, False),
    ]
    tracker.update(
        0.5, timesteps="another run"
    )  # one step, at the time at which the last run ended
    assert (tracker.step, tracker.is_negative) == (0, False)


def test_scheduler_index_distinguishes_steps_of_equal_time() -> None:
    tracker, positions = StepTracker(), []
    for time, index in ((1.0, None), (1.0, None), (1.0, 1), (1.0, 1), (0.9, 2), (0.9, 3)):
        tracker.update(time, "run", index)
        positions.append((tracker.step, tracker.is_negative))
    assert positions == [(0, False), (0, True), (1, False), (1, True), (2, False), (3, False)]


def test_bare_transformer_has_no_fraction() -> None:
    tracker = StepTracker()
    tracker.update(1.0)
    assert tracker.position == SchedulePosition(None, 0)
    assert Span(start_step=0).contains(tracker.position)
    assert not Span(start_step=1).contains(tracker.position)
    with pytest.raises(OptionError, match="use start_step with a bare transformer"):
        Span(0.5).contains(tracker.position)


@pytest.mark.parametrize("num_steps", [3, 4, 9, 30])
@pytest.mark.parametrize("end", [0.0, 0.1, 1 / 3, 0.5, 0.6, 0.75, 0.99, 1.0])
def test_whole_steps_end_as_in_diffusers(num_steps: int, end: float) -> None:
    """FluxControlNetPipeline leaves out step i of n if (i + 1) / n is beyond the end."""
    span = Span(0.0, end, whole_steps=True)
    for step in range(num_steps):
        position = SchedulePosition(step / num_steps, step, num_steps)
        assert span.contains(position) is ((step + 1) / num_steps <= end)
    with span.watch("the identity") as watched:
        assert watched.whole_steps


@pytest.mark.parametrize("num_steps", [3, 9, 10, 28])
def test_spans_split_every_schedule_without_gap(num_steps: int) -> None:
    """Rounding must not move a step at the boundary into both spans or none."""
    for boundary in range(num_steps + 1):
        fraction = boundary / num_steps
        for step in range(num_steps):
            position = SchedulePosition(step / num_steps, step)
            assert Span(0.0, fraction).contains(position) == (step < boundary)
            assert Span(fraction, 1.0).contains(position) == (step >= boundary)


@pytest.mark.parametrize("options", [{"start": -0.1}, {"end": 1.5}, {"start_step": -1}])
def test_span_out_of_range_raises(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="start"):
        Span(**options)


def test_pipeline_state_reads_current_network(tiny_pipeline: Any) -> None:
    """A pipeline's network may be exchanged; a bare network is its own."""
    pipe, second = tiny_pipeline(0), tiny_pipeline(1)
    state = PipelineState(pipe)
    assert state.network is pipe.unet
    pipe.unet = second.unet
    assert state.network is second.unet
    assert PipelineState(second.unet).network is second.unet
    assert not PipelineState(second.unet).is_guided()
    assert PipelineState(second.unet).position(999).fraction == pytest.approx(0.001)


def test_span_without_a_step_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    positions = [SchedulePosition(step / 4, step) for step in range(4)]

    def count(span: Span) -> int:
        caplog.clear()
        with span.watch("the identity") as watched:
            return sum(map(watched.contains, positions))

    assert count(Span(0.75)) == 1 and not caplog.records
    assert count(Span(0.5, 0.5)) == 0
    assert "start 0.5 is not before end 0.5; the identity has no effect" in caplog.text
    assert count(Span(0.9)) == 0
    assert "no step was between start 0.9 and end 1, from step 0 on" in caplog.text
    assert count(Span(start_step=4)) == 0 and "from step 4 on" in caplog.text
    with Span(0.9).watch("the identity"):  # nothing ran
        caplog.clear()
    assert not caplog.records


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1, "0.8", None])
def test_scale_must_be_a_number(scale: Any) -> None:
    check_scale(0)
    with pytest.raises(OptionError, match="scale must be a number of 0 or more; got"):
        check_scale(scale)


@pytest.mark.parametrize("kind", [FaceID, ControlNet])
def test_methods_note_a_span_without_a_step(
    tiny_pipeline: Any, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny_pipeline()
    subject: Any = person(1)
    if kind is ControlNet:
        method, subject = ControlNet(controlnet(pipe.unet)), torch.zeros(3, 16, 16)
    else:
        method = FaceID(published(pipe.unet))
    method.attach(pipe)
    plain = generate(pipe)
    with method.use(subject, start=0.9):  # two steps: the last begins at 0.5
        assert torch.equal(generate(pipe), plain)
    assert "no step was between start 0.9 and end 1" in caplog.text
    caplog.clear()
    with method.use(subject, start=0.8, end=0.5):
        assert torch.equal(generate(pipe), plain)
    assert "start 0.8 is not before end 0.5" in caplog.text
    with pytest.raises(OptionError, match="got nan"), method.use(subject, scale=float("nan")):
        pass
