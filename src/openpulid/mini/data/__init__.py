"""Training data of the miniature: augmentation, negatives, cached captions and features."""
