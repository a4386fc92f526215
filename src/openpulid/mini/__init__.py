"""The miniature: a complete small sibling of everything, trained from nothing on procedural people."""
