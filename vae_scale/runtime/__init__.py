"""How processes run: devices, precision, sharding, signals, checkpoints."""
