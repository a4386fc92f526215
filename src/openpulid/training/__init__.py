"""Training: a loop that knows no loss, losses that know no base, a base behind three functions."""
