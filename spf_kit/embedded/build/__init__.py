"""The scripts that made the embedded base model, its judge and its sample pictures."""
