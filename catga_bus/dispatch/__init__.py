"""What runs in a node: deliveries admitted, run and settled, with a task or a thread only where one is needed."""
