"""What a machine is, what is installed on it, and what really runs there: all of it read only."""
