"""Results at a glance: the few numbers that matter, and a short text."""
