"""Redundancy in the weights: one file, one metric."""
