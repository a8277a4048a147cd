"""From the forward pass to a step: gradients, recomputation, precision."""
