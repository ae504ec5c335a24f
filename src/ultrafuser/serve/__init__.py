"""The server: an OpenAI-compatible API over an engine, on vLLM or on transformers alone."""
