"""Evaluation of trained models: metrics, image grids, samples, and encoding to latents."""
