"""The order in which images are served."""

from __future__ import annotations

from openpulid.service.store.fairness import WaitingJob, choose_batch, count_before, fair_order


def job(name: str, waiting: int = 1, turn: int = 0, owner_turn: int = 0, key: str | None = "k"):
    return WaitingJob(name, name[0], key, waiting, turn, owner_turn)


def names(jobs) -> str:
    return " ".join(job.id for job in jobs)


def test_owners_take_turns() -> None:
    jobs = [job("a1", 4), job("b1", 2), job("c1")]
    assert names(fair_order(jobs)) == "a1 b1 c1 a1 b1 a1 a1"


def test_jobs_of_an_owner_take_turns() -> None:
    jobs = [job("a1", 3, turn=1), job("a2", 2, turn=2), job("b1", 2)]
    assert names(fair_order(jobs)) == "a1 b1 a2 b1 a1 a2 a1"


def test_longest_unserved_owner_is_next() -> None:
    assert names(fair_order([job("a1", owner_turn=7), job("b1", owner_turn=5)])) == "b1 a1"


def test_a_new_job_waits_for_older_ones_of_its_owner_once() -> None:
    """Neither the large old job nor the stream of new ones starves."""
    jobs = [job("a1", 3, turn=5), job("a2", turn=6), job("a3", turn=7)]
    assert names(fair_order(jobs)) == "a1 a2 a3 a1 a1"


def test_a_batch_has_one_key_and_the_first_of_all_jobs() -> None:
    jobs = [job("a1", 2, key="x"), job("b1", 2, key="y", owner_turn=1), job("c1", 2, key="x")]
    assert names(choose_batch(jobs, 3)) == "a1 c1 a1"
    assert names(choose_batch(jobs, 8)) == "a1 c1 a1 c1"


def test_without_a_key_a_job_runs_alone() -> None:
    assert names(choose_batch([job("a1", 3, key=None), job("b1", key=None)], 8)) == "a1"


def test_nothing_waits() -> None:
    assert choose_batch([], 8) == []


def test_position_counts_the_images_before() -> None:
    jobs = [job("a1", 5), job("a2", 1, turn=1), job("b1", 1, owner_turn=3)]
    assert [count_before(jobs, name) for name in ("a1", "b1", "a2", "c1")] == [0, 1, 2, None]
