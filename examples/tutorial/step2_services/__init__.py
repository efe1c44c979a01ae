"""Step 2 of the tutorial: services that know no request."""
