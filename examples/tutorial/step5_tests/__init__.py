"""Step 5 of the tutorial: the same application, with tests of endpoints and of services."""
