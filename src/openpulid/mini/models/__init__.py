"""Networks and pipeline of the miniature."""
