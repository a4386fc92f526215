"""Checks of an installation: packages, devices, weights, and whether the miniature works."""
