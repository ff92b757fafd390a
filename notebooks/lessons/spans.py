"""Where a tensor lies in memory, and which bytes of it were touched."""

import numpy as np
import torch


class Span:
    """A tensor's memory, from its first element to its last; which bytes of it kernels read and wrote."""

    def __init__(self, name, tensor):
        self.name, self.tensor = name, tensor
        reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        self.size = tensor.element_size()
        self.start, self.bytes = tensor.data_ptr(), (reach if tensor.numel() else 0) * self.size
        self.read, self.written = np.zeros(self.bytes, bool), np.zeros(self.bytes, bool)
        self.left = self.now()

    def now(self) -> bytes:
        flat = self.tensor.as_strided((self.bytes // self.size,), (1,)) if self.bytes else self.tensor.flatten()
        return flat.detach().cpu().view(torch.uint8).numpy().tobytes()

    def elements(self, touched):
        """Boolean array of the tensor's shape: all bytes of an element were touched."""
        whole = touched.reshape(-1, self.size).all(1)
        strides = [stride * whole.itemsize for stride in self.tensor.stride()]
        return np.lib.stride_tricks.as_strided(whole, tuple(self.tensor.shape), strides)

    def holds(self, addresses, width):
        return (addresses >= self.start) & (addresses + width <= self.start + self.bytes)

    def mark(self, touched, addresses, width):
        at = addresses[self.holds(addresses, width)] - self.start
        for byte in range(width):
            touched[at + byte] = True


def home(tensor):
    """What a tensor and its views have in common."""
    return tensor.untyped_storage().data_ptr()


def addresses_of(tensor):
    """Of all its elements."""
    at = np.array(tensor.data_ptr(), np.int64)
    for count, stride in zip(tensor.shape, tensor.stride(), strict=True):
        at = at[..., None] + np.arange(count) * stride * tensor.element_size()
    return at.reshape(-1)
