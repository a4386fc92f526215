"""PuLID (arXiv 2404.16022): an identity encoder and a second cross-attention beside the text's."""
