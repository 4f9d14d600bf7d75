"""The page of several subjects side by side."""
