"""One file per command; each has one main(argv)."""
