"""Complete training recipes: Python functions that return them."""
