"""How sure a number over images is: pure NumPy and SciPy."""
