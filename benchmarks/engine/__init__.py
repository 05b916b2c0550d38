"""Measures the CPU engine beside what the machine can do and beside peers: `python -m benchmarks.engine`."""
