"""The CPU backend: C++, compiled at first use."""
