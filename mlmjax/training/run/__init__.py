"""The room `training/run`."""
