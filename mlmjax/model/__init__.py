"""The network: its configuration, layers, attention, encoder and heads.

Tensors enter, tensors leave. This room knows no files, no clock and no run. Read it in this order:
architecture, layers, attention, encoder, modernbert.
"""
