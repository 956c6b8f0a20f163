"""Turn text into tokens: the tokenizer, labels as tokens, prompts with one slot.

Text, labels and templates enter; token ids and the position of the slot leave. This folder never
loads jax and knows no files but the tokenizer's.
"""
