"""Tasks: parsing of answers, metrics, and result files for challenge servers."""
