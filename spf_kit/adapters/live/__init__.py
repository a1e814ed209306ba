"""Adapters of each kind on a live model, through peft's layers; one file for each kind."""
