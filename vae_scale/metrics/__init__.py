"""What images are like, measured: they know tensors, and neither models nor data."""
