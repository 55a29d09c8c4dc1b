"""Data: record builders, the plan of batches, reading, text tokens."""
