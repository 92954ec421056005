"""Evidence: suites and their scoring, beside training or after it, stored so that models can be compared."""
