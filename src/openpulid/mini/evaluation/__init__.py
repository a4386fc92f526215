"""Evaluation of the miniature: demo, tables, ablation, and its scorers."""
