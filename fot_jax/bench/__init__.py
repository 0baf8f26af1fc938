"""`fot bench`: speed and memory as ratios to what the machine can do, in the same run."""
