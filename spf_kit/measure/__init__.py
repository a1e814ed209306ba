"""What a LoRA does to its base (response, preservation, leakage, drift), and what a training holds."""
