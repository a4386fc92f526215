"""Face detection, alignment, segmentation and recognition."""
