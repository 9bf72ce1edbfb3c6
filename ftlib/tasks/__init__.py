"""Tasks: how an answer is read, which metrics judge it and what a challenge server takes."""
