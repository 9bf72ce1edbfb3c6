"""Answers and scores of a model on a split."""
