"""The playground: chat in a browser, with the weights of every token."""
