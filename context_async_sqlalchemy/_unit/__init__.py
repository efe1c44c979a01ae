"""The unit of work: what a context is, and how it is settled, ended and repeated."""
