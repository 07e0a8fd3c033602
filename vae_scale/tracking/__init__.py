"""Experiment tracking: metrics, events, images and terminal output."""
