"""Where the time and the memory of a training step go: named ranges, traces, a timeline, a table by layer."""
