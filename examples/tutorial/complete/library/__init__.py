"""A library: its books, and who has them."""
