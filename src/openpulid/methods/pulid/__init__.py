"""PuLID (arXiv 2404.16022): an identity encoder and an identity attention next to the text's."""
