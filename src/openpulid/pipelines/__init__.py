"""Presets, the factory that loads them, and the studio that generates images."""
