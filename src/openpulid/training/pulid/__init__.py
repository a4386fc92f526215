"""Training of PuLID: recipes, branches, losses, and the entry points."""
