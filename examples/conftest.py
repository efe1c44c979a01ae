"""The steps of the tutorial have fixtures, and a configuration, of their own."""

collect_ignore = ["tutorial"]
