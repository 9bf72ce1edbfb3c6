"""The import path of jobs that ftlib 0.1 has queued (pickled); removed in 0.3."""
