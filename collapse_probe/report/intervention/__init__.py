"""The page of an intervention."""
