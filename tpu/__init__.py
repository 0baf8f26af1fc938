"""`python -m tpu`: runs on the hosts of a TPU pod, or on this machine as if it were one."""
