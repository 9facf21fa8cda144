"""All models of a step in one grouped matrix product per layer: the layout of devices, and of CPUs without ours."""
