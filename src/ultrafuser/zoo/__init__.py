"""The specialists and data of the demo: three adapters on SmolLM2-135M-Instruct and a small hand-made data set."""
