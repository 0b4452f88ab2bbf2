"""Lowerings: one target per file, each from a StepProgram to something callable or to a file."""
