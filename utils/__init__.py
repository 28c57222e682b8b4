"""Helpers of the two scripts: command line, run folder, checkpoints, optimizers, prediction, figures."""
