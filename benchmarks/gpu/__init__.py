"""What the engine does on a GPU, beside that GPU's ceilings and a peer: `python -m benchmarks.gpu`."""
