"""The embedded default: three adapters on SmolLM2-135M-Instruct, and a small hand-made data set."""
