"""The training loop, objectives, optimizer step and checkpoints."""
