"""Image data sets in one tensor each, and their batches.

The data set comes from the package itself (``digits``), from a folder, or from the Hugging Face Hub; everything is
decoded once into uint8 on the device, and every batch is made there.
"""

from chtconv.data.batches import Batches
from chtconv.data.dataset import Dataset, ImageSet, fingerprint, load_dataset

__all__ = ["Batches", "Dataset", "ImageSet", "fingerprint", "load_dataset"]
