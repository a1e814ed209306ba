"""Peak memory of a training, without a GPU and without weights."""
