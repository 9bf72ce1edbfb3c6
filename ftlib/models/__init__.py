"""Model families: inputs, adapters, loading, generation. Importing this imports torch and transformers."""
