"""The tables of users, categories and tasks."""

import sqlalchemy as sa
from alembic import op

revision = "first_tables"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "user_account",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_user_account"),
        sa.UniqueConstraint("name", name="uq_user_account_name"),
    )
    op.create_table(
        "category",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_category"),
        sa.ForeignKeyConstraint(
            ["user_id"], ["user_account.id"], name="fk_category_user_id"
        ),
        sa.UniqueConstraint("user_id", "name", name="uq_category_user_id_name"),
    )
    op.create_table(
        "task",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("title", sa.String(200), nullable=False),
        sa.Column("category_id", sa.Integer(), nullable=True),
        sa.Column("completed", sa.Boolean(), nullable=False),
        sa.Column("processed", sa.Boolean(), nullable=False),
        sa.Column("deliveries_left", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_task"),
        sa.ForeignKeyConstraint(
            ["user_id"], ["user_account.id"], name="fk_task_user_id"
        ),
        sa.ForeignKeyConstraint(
            ["category_id"], ["category.id"], name="fk_task_category_id"
        ),
        sa.UniqueConstraint("user_id", "title", name="uq_task_user_id_title"),
    )
    op.create_index("ix_task_deliveries_left", "task", ["deliveries_left"])


def downgrade() -> None:
    for table in "task", "category", "user_account":
        op.drop_table(table)
