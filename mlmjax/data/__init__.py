"""Turn records in files into batches of packed rows.

Files and data configurations enter; rows folders and batches leave. This folder never loads jax.
"""

from mlmjax.data.batch import Batch, Example
from mlmjax.data.masking.draws import mask_answer, mask_dummy, mask_random
from mlmjax.data.packing import pack

__all__ = ["Batch", "Example", "mask_answer", "mask_dummy", "mask_random", "pack"]
