"""The training loop and what it optimizes."""
