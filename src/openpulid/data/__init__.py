"""From folders, archives and tables of images to a dataset for training (`pulid data prepare`)."""
