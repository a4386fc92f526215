"""From a picture to a face: where it is, which pixels are its own, and who it is."""
