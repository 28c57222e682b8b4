"""Tools of the two doors: settings, checkpoints, optimizers, run folder, pictures drawn."""
