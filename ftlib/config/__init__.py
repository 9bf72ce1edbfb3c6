"""Experiment configs: schema, loading and validation, and the run ID."""
