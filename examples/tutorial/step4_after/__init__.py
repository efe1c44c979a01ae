"""Step 4 of the tutorial: what is done after the response, and after the commit."""
