"""Measurements of a trained run: anytime, budgeted, calibration, conflict; tables, files, plots."""
