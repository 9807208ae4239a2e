"""From samples of rows to tables of thresholds."""
