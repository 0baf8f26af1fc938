"""`fot compile`: what the TPU compiler says of an experiment, without a TPU."""
