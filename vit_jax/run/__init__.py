"""What makes a run end well: its logs, signals, several processes, memory, disk and resuming."""
