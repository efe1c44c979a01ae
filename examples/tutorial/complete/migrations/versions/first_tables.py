"""The tables of books and loans."""

import sqlalchemy as sa
from alembic import op

revision = "first_tables"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "book",
        sa.Column("isbn", sa.String(), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("times_lent", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("isbn", name="pk_book"),
    )
    op.create_table(
        "loan",
        sa.Column("isbn", sa.String(), nullable=False),
        sa.Column("reader", sa.String(), nullable=False),
        sa.Column("reminded", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["isbn"], ["book.isbn"], name="fk_loan_isbn"),
        sa.PrimaryKeyConstraint("isbn", name="pk_loan"),
    )


def downgrade() -> None:
    op.drop_table("loan")
    op.drop_table("book")
