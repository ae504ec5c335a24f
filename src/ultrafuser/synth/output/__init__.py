"""The finished data set and its card."""
