"""Samplers, schedulers, noise schedules and the autoencoder of the miniature."""
