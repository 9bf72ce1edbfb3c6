"""One HTML page out of a run folder."""
