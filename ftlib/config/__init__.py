"""One YAML file describes one experiment: its schema, how it is read, what names it."""
