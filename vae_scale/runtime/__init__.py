"""Runtime: launching, precision, sharding, compilation, signals, watchdog and checkpoints."""
