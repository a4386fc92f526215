"""The tables of the database. Times are seconds since 1970 (UTC)."""

from __future__ import annotations

from datetime import datetime, timezone

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("status", String(16), nullable=False),
    Column("preset", Text, nullable=False),
    # tasks of equal keys can run as one batch; null: each runs alone
    Column("batch_key", Text),
    # a GenerationRequest as JSON, and the fields of it that are files in the job's folder
    Column("request", Text, nullable=False),
    Column("files", Text, nullable=False),
    Column("waiting", Integer, nullable=False),
    # number of the turn in which a task of the job was claimed last
    Column("turn", BigInteger, nullable=False),
    Column("created", Double, nullable=False),
    Column("started", Double),
    Column("finished", Double),
    Column("expires", Double),
    # previews are written until then
    Column("watched", Double, nullable=False),
    Column("problem", Text),
    # whether the problem is the fault of the service, not of the request
    Column("is_service_problem", Boolean, nullable=False),
    Index("jobs_waiting", "waiting"),
    Index("jobs_turn", "turn"),
    Index("jobs_expires", "expires"),
)

tasks = Table(
    "tasks",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("status", String(16), nullable=False),
    Column("worker", String(128)),
    # the claim is void from then on
    Column("lease", Double),
    Column("attempt", Integer, nullable=False),
    # workers that ended without a word while they ran the task
    Column("interruptions", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("total_steps", Integer, nullable=False),
    Column("width", Integer),
    Column("height", Integer),
    Index("tasks_lease", "status", "lease"),
)

owners = Table(
    "owners",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("turn", BigInteger, nullable=False),
)

identities = Table(
    "identities",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("created", Double, nullable=False),
    Column("expires", Double, nullable=False),
    Index("identities_expires", "expires"),
)


def to_datetime(seconds: float) -> datetime:
    """Turn a time of the database into one with a time zone."""
    return datetime.fromtimestamp(seconds, timezone.utc)
