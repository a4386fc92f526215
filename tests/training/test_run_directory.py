"""A run directory in trouble: full disk, damaged or foreign files, two processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from openpulid.errors import OptionError, TrainingError
from openpulid.io.lock import LOCK, lock_directory
from openpulid.training.checkpointing import CHECKPOINT, checksum, read_checkpoint
from openpulid.training.trainer import run
from tests.training.test_trainer import SHORT, Regression

CHECKPOINTED = replace(SHORT, save_minutes=0.0)


@contextmanager
def full_disk():
    """Let every write to a file fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def read_scalars(folder):
    """Return (tag, step) of every scalar that TensorBoard reads."""
    scalars = []
    for path in sorted(folder.glob("tensorboard/*")):
        for event in EventFileLoader(str(path)).Load():
            scalars += [(value.tag, event.step) for value in event.summary.value]
    return scalars


def read_history(folder):
    return json.loads((folder / "history.json").read_text())


class Unlucky(Regression):
    """The disk is full from step 6 to step 15."""

    def losses(self, rng):
        if rng.step == 6:
            self.disk = full_disk()
            self.disk.__enter__()
        if rng.step == 15:
            self.disk.__exit__(None, None, None)
        return super().losses(rng)


def test_training_survives_a_disk_that_is_full_for_a_while(tmp_path, capsys):
    result = run(Unlucky(), CHECKPOINTED, tmp_path)
    assert result.steps == 24
    errors = capsys.readouterr().err
    assert "run.safetensors could not be written" in errors and "Training continues." in errors
    assert "Traceback" not in errors
    logged = [4, 8, 12, 16, 20, 24]
    assert [record["step"] for record in read_history(tmp_path) if "losses" in record] == logged
    # nothing that was logged meanwhile is missing
    assert [step for tag, step in read_scalars(tmp_path) if tag == "loss/square"] == logged
    assert {path.name for path in tmp_path.glob(".*")} == set()


@pytest.mark.usefixtures("capsys")  # pytest itself writes what is printed into a file
def test_last_checkpoint_on_a_full_disk_is_one_sentence(tmp_path):
    run(Regression(), replace(SHORT, steps=5), tmp_path)
    good = (tmp_path / CHECKPOINT).read_bytes()
    with full_disk(), pytest.raises(TrainingError, match=r"run\.safetensors could not be written"):
        run(Regression(), SHORT, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == good


@pytest.mark.usefixtures("capsys")
def test_not_finite_loss_on_a_full_disk_names_both(tmp_path):
    message = r"not finite at step 3 .*could not be written.*the last checkpoint is intact"
    with full_disk(), pytest.raises(TrainingError, match=message):
        run(Regression(bad_at=3), SHORT, tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "notes.txt/run", "/proc/run"])
def test_directory_that_cannot_be_written_is_one_sentence(tmp_path, name):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"cannot be written .*choose another directory"):
        run(Regression(), SHORT, tmp_path / name)


@pytest.mark.parametrize(
    ("content", "num_records"),
    [
        (b"", 0),
        (b"[" * 100_000, 0),
        (b"\xff\xfe{", 0),
        (b'{"step": 4}', 0),
        (b'[{"step": 4, "losses": {"square": 1.0}}, 7, {"step": "x", "losses": {}}]', 1),
        (b'[{"step": 4, "losses": {"square": "high"}}]', 0),
    ],
)
def test_damaged_history_is_kept_and_the_run_continues(tmp_path, capsys, content, num_records):
    run(Regression(), replace(SHORT, steps=8), tmp_path)
    (tmp_path / "history.json").write_bytes(content)
    assert run(Regression(), SHORT, tmp_path).steps == 24
    assert (tmp_path / "history.damaged.json").read_bytes() == content
    steps = [record["step"] for record in read_history(tmp_path) if "losses" in record]
    assert steps == [4] * num_records + [12, 16, 20, 24]
    assert "history.json is damaged" in capsys.readouterr().err


def test_history_is_json_even_if_a_metric_is_not_a_number(tmp_path):
    task = Regression()
    task.validate = lambda: {"weight": float("nan")}
    run(task, replace(SHORT, steps=8), tmp_path)
    assert read_history(tmp_path)[-1]["metrics"] == {"weight": None}
    result = run(Regression(), replace(SHORT, steps=8), tmp_path)
    assert str(result.metrics["weight"]) == "nan"


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_of_a_checkpoint_are_noticed(tmp_path, seed):
    run(Regression(), replace(SHORT, steps=5), tmp_path)
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(seed)
    # twenty bytes of the tensors, or a single one anywhere
    count, start = (20, header) if seed else (1, 0)
    for index in torch.randint(start, len(content), (count,), generator=generator).tolist():
        content[index] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"is damaged|not a checkpoint"):
        run(Regression(), SHORT, tmp_path)


def test_any_flipped_byte_of_the_header_is_one_sentence(tmp_path):
    path = tmp_path / CHECKPOINT
    facts = '{"progress": {"total": 5, "step": 5}, "minutes": null}'
    tensors = {"weights.net.0.weight": torch.ones(8, 4)}
    save_file(tensors, path, {"facts": facts, "checksum": checksum(tensors, facts)})
    original = path.read_bytes()
    for index in range(0, len(original), 7):
        content = bytearray(original)
        content[index] ^= 0x04
        path.write_bytes(content)
        with pytest.raises(TrainingError, match=r"is damaged|not a checkpoint"):
            read_checkpoint(path)


def test_every_tensor_and_its_name_counts_for_the_checksum():
    tensors = {
        "a": torch.zeros(3),
        "b": torch.zeros(0),
        "c": torch.tensor(1.0, dtype=torch.bfloat16),
    }
    values = {
        checksum(tensors, ""),
        checksum(tensors, "x"),
        checksum({**tensors, "b": torch.zeros(0, 2)}, ""),
        checksum({**tensors, "b": torch.zeros(0).double()}, ""),
        checksum({**tensors, "c": -tensors["c"]}, ""),
        checksum({("d" if name == "c" else name): x for name, x in tensors.items()}, ""),
    }
    assert len(values) == 6
    assert checksum(dict(reversed(tensors.items())), "") == checksum(tensors, "")


@pytest.mark.parametrize(
    "facts",
    [
        {"step": 3},
        {"progress": {"total": 5, "step": "x"}, "config": {"name": "", "seed": 0}, "minutes": None},
        {
            "progress": {"total": 5, "step": -1},
            "config": {"name": "", "seed": 0, "optimizer": "adamw"},
            "minutes": None,
        },
        {
            "progress": {"total": 5, "step": 5, "seconds": float("nan")},
            "config": {"name": "", "seed": 0, "optimizer": "adamw"},
            "minutes": None,
        },
        [],
    ],
)
def test_checkpoint_with_other_metadata_is_of_another_version(tmp_path, facts):
    run(Regression(), replace(SHORT, steps=5), tmp_path)
    path = tmp_path / CHECKPOINT
    tensors, text = load_file(path), json.dumps(facts)
    save_file(tensors, path, {"facts": text, "checksum": checksum(tensors, text)})
    with pytest.raises(TrainingError, match="written by another version"):
        run(Regression(), SHORT, tmp_path)


def test_run_of_another_optimizer_is_refused(tmp_path):
    run(Regression(), replace(SHORT, steps=5), tmp_path)
    with pytest.raises(TrainingError, match="was trained with adamw, not muon"):
        run(Regression(), replace(SHORT, optimizer="muon"), tmp_path)


def test_second_run_in_the_same_directory_is_refused(tmp_path):
    errors = []

    class Visited(Regression):
        def losses(self, rng):
            if rng.step == 3:
                with pytest.raises(OptionError) as raised:
                    run(Regression(), SHORT, tmp_path)
                errors.append(str(raised.value))
            return super().losses(rng)

    assert run(Visited(), SHORT, tmp_path).steps == 24
    assert f"in use by another process (process {os.getpid()} on " in errors[0]
    assert run(Regression(), SHORT, tmp_path).steps == 24  # free again


def test_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from openpulid.io.lock import lock_directory\n"
        "with lock_directory(Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / LOCK).read_text().startswith("process ")
    with lock_directory(tmp_path):
        pass


def test_lock_holds_between_threads(tmp_path):
    refused = []

    def enter():
        try:
            with lock_directory(tmp_path):
                pass
        except OptionError as error:
            refused.append(error)

    with lock_directory(tmp_path):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(refused) == 1
