"""What a command writes to the terminal or to a cluster's logs: messages, progress and results."""
