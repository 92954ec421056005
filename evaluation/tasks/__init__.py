"""The tasks of a suite, by kind: what each holds, and how vectors are scored on it."""
