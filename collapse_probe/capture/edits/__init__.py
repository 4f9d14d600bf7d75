"""Running a model with something changed while it runs; whatever is not changed stays the same to the bit."""
