"""Several models on few cores: our policies against each other, and against one server per model."""
