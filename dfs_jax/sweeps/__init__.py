"""A grid of runs, the record of each, and the report on them."""
