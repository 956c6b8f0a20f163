"""The network: its configuration, layers, attention, encoder and heads.

Tensors enter, tensors leave. This folder knows no files, no clock and no run. Read it in this
order: architecture, layers, attention, encoder, modernbert. `blockwise` holds details of attention,
`cpu` those of compiling for CPUs, and `vocabulary` adds words to a finished model.
"""
