"""The few numbers that stand for a run: which there are, what they are means of, and thresholds on them."""
