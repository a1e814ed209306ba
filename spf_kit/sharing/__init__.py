"""A finished run as a folder to upload: the LoRA, a model card, pictures with their parameters."""
