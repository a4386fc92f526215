"""Training of the complete miniature on one GPU in minutes; all data stays on the device."""
