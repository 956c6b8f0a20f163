"""The room `weights`."""
