"""The GPU acceptance run: `make gpu`."""
