"""The room `parallel`."""
