"""From sampled rows to tables of thresholds, and their files."""
