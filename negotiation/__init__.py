"""How much: what is negotiated, how each side decides, and the limits that nothing passes."""
