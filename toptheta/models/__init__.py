"""All that knows transformers: patching, steering, caches, generation, loading."""
