"""Only what jobs that were queued by ftlib 0.1 are pickled with; it goes with 0.3."""
