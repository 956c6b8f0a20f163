"""From records in files to batches of packed rows; nothing here imports jax."""

from mlmjax.data.batch import Batch, Example
from mlmjax.data.masking import mask_answer, mask_dummy, mask_random
from mlmjax.data.packing import pack

__all__ = ["Batch", "Example", "mask_answer", "mask_dummy", "mask_random", "pack"]
