"""What it costs: time, memory and size, measured."""
