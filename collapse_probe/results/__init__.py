"""Plain numbers, the folders that they live in, and how the rules of the verdict come out on them."""
