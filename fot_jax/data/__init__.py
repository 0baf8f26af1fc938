"""Documents, and the lanes that turn them into batches."""
