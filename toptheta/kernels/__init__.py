"""Fast backends for attention calls, and the registry that chooses one."""
