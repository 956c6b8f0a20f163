"""The room `evaluation/suite`."""
