"""Pure functions on arrays that metrics and penalties share."""
