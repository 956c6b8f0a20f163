"""The room `training/planning`."""
