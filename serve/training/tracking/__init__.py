"""What is recorded of how a model was made, and where else it is told."""
