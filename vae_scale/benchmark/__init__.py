"""Measurements against what else a user could pick."""
