"""Identity -> a base model that shows it."""
