"""What runs in a peer's interpreter. Nothing here imports ours."""
