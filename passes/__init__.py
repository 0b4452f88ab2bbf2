"""Graph rewrites, one effect per file. A pass is a frozen dataclass: its fields are its options, calling it maps a
StepProgram to a new StepProgram and leaves its input as it was."""
