"""Measurements of `python -m vae_scale.bench`."""
