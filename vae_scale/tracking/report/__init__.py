"""Runs as a page that anyone can open."""
