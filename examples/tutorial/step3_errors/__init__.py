"""Step 3 of the tutorial: a duplicate is a 409."""
