"""How a call is computed fast: backends, and the registry that chooses among them."""
