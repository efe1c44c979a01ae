"""Step 1 of the tutorial: one model, and one file."""
