"""Evaluation of the miniature."""
