"""PhotoMaker: the word for a person becomes the person."""
