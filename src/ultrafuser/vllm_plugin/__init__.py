"""vLLM runs fused models: the plugin that an unmodified vLLM loads by its entry point."""
