"""Images, checkpoints and published weights: everything that is read or written."""
