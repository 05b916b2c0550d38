"""Placement algorithms beside each other, and predicted costs beside measured ones."""
