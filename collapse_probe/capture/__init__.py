"""How attention is heard: recorded, traced, replaced, with gradients; and the weights behind it."""
