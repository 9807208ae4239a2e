"""A run: settings, the loop over cells, data sets, what is kept of it."""
