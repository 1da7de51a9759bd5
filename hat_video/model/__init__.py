"""HAT, its checkpoints and the models that have names. Pixels only; knows nothing of video."""
