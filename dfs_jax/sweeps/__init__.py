"""A grid of runs and its report."""
