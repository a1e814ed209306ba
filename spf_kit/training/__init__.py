"""Training: the step, the loop around it, and everything that a run keeps."""
