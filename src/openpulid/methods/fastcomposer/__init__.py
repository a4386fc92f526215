"""FastComposer (arXiv 2305.10431): words of the prompt are fused with one token per person."""
