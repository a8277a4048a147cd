"""What is found out about a graph: positions, masks, axes, rows of a batch, cost."""
