"""Native kernels: tensors in and out, nothing of the house imported."""
