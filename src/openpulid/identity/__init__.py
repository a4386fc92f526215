"""Face -> Identity: features of a person that every encoder can read."""
