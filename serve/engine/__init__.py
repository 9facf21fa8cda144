"""Many GPT-2s in one forward pass. Knows slots and rows; not which model is which, nor where weights come from."""
