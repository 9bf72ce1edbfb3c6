"""What tests/benchmarks/training.py runs, each in a process of its own."""
