"""Create the tables of jobs and identities."""

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("preset", sa.Text, nullable=False),
        sa.Column("batch_key", sa.Text),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("files", sa.Text, nullable=False),
        sa.Column("waiting", sa.Integer, nullable=False),
        sa.Column("turn", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("started", sa.Double),
        sa.Column("finished", sa.Double),
        sa.Column("expires", sa.Double),
        sa.Column("watched", sa.Double, nullable=False),
        sa.Column("problem", sa.Text),
        sa.Column("is_service_problem", sa.Boolean, nullable=False),
    )
    op.create_index("jobs_waiting", "jobs", ["waiting"])
    op.create_index("jobs_turn", "jobs", ["turn"])
    op.create_index("jobs_expires", "jobs", ["expires"])
    op.create_table(
        "tasks",
        sa.Column(
            "job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("worker", sa.String(128)),
        sa.Column("lease", sa.Double),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("interruptions", sa.Integer, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("total_steps", sa.Integer, nullable=False),
        sa.Column("width", sa.Integer),
        sa.Column("height", sa.Integer),
    )
    op.create_index("tasks_lease", "tasks", ["status", "lease"])
    op.create_table(
        "owners",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("turn", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "identities",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("expires", sa.Double, nullable=False),
    )
    op.create_index("identities_expires", "identities", ["expires"])
