"""Training of every part of the miniature."""
