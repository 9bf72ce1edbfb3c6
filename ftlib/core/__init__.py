"""Utilities for all other packages: files, leases, signals, log, paths, permissions. No torch."""
