"""The page of a gallery of models."""
