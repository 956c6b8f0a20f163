"""The room `data/reading`."""
