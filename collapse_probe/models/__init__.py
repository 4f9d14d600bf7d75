"""Models: where they come from, our own, the fixes, checkpoints."""
