"""What gateway, scheduler, worker and client cost per token, over an engine that is simulated."""
