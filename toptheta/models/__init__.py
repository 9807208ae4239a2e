"""Everything that depends on transformers: patching, setting parameters, caches, generation, loading."""
