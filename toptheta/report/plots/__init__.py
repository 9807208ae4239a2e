"""Plots of the files in a run's folder. They need matplotlib and pandas, but not torch."""
