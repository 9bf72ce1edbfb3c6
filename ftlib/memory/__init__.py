"""Estimates of a config's GPU memory, from shapes alone."""
