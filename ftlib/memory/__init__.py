"""What a config will need on a GPU, from shapes alone."""
