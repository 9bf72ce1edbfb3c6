"""Datasets: reading, validation, images, splits and prompts. Nothing here imports torch."""
