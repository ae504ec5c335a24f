"""Look inside a fused model: the gate weights of each token, as coloured text, HTML and figures."""
