"""Methods that show an identity with a base model."""
