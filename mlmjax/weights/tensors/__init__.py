"""Read and write tensors as Hugging Face files have them.

Files and parameters enter; arrays by their names and files leave. This folder knows nothing of
configurations, cards or the hub.
"""
