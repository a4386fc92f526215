"""PhotoMaker (arXiv 2312.04461): the class word of the prompt is fused with identity tokens."""
