"""The model: attention in parts, crossbatch, memory, and the two transformer families."""
