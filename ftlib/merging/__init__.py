"""Fine-tuned models over one base become one model: updates, methods, and the stream that writes the result."""
