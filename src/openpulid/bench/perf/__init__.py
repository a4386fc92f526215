"""Latency and memory of inference, face analysis and training."""
