"""The benchmark: methods compared on the same subjects, prompts and seeds."""
