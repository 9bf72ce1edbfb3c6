"""The Hugging Face hub: the store's cache, downloads into it, uploads."""
