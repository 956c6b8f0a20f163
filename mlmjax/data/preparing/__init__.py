"""The room `data/preparing`."""
