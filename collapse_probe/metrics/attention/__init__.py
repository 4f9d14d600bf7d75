"""The attention-map metrics."""
