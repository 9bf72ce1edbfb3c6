"""Records, images, splits and prompts: pure functions over files, no torch."""
