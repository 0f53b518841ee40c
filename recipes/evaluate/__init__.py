"""Measure checkpoints: one run (`run`), and several against each other (`compare`)."""
