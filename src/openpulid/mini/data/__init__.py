"""Cached training data of the miniature."""
