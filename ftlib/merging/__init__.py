"""Merge fine-tuned models of one base: task vectors, merge methods, and streaming of the result."""
