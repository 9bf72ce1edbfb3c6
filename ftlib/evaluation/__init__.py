"""Evaluation: predictions and scores of a model on a split, prompt search, interactive queries."""
