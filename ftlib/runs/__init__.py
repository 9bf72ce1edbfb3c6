"""Run folders: files, history, and the pinned code and data of a run."""
