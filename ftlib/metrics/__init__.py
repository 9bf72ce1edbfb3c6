"""Official metrics over plain records; no torch."""
