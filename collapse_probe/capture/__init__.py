"""How attention is captured: recorded, traced, replaced, with gradients; and the weights behind it."""
