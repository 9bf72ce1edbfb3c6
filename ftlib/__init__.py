"""ftlib: fine-tune and evaluate PaliGemma and causal language models as Slurm jobs inside a container."""

__version__ = "0.1.0"
