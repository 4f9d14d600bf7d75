"""By which matrices the blocks of a model multiply, read off what it computes."""
