"""Engines to compare with, each a program for its own interpreter; see `wire`. Nothing here imports ours."""
