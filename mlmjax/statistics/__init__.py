"""The room `statistics`."""
