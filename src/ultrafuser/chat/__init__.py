"""Chat in the terminal: with a model in this process or behind an endpoint, with the weights of every token."""
