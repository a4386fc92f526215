"""The workers: they claim images from the store, generate them, and publish them."""
