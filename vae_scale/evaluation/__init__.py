"""How good a model is: metrics on held-out images, and pictures."""
