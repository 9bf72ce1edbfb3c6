"""Model families: inputs, adapters, loading, generation."""
