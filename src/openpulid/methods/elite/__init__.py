"""ELITE (arXiv 2302.13848): a word of the prompt means an image, whose patches it attends to."""
