"""Training: a loop that is independent of losses, models and data, and PuLID's training."""
