"""Training of PuLID."""
