"""The patch-embedding metrics."""
