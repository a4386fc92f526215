"""The miniature: a complete small model family, trained from scratch on synthetic people."""
