"""From the forward pass to what a session runs: caches, inputs, quantized weights."""
