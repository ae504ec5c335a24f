"""Map of a data set: embeddings, layout, page."""
