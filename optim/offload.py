"""Keeping a rank's gradients, master weights and moments in the host's memory.

ZeRO-Offload (Ren et al. 2021, "ZeRO-Offload: Democratizing billion-scale model training",
section 4) leaves on the device what forward and backward need, the 16-bit weights, and moves what
only the optimizer needs. A step of a rank that owns M = A / N parameters then is

    backward     a bucket's reduced gradient, 2M in all, goes to the host while backward computes the next
    step         on the CPU, where masters and moments (12M) are
    afterwards   the rounded weights, 2M in all, go to the device while the CPU rounds the next ones

so 4M bytes cross the bus each step, and the device holds 2A instead of 2A + 14M.

Copies overlap with the device's work only from and to pinned (page-locked) memory, on a stream of their
own; `Host` has both. Without a GPU its copies are ordinary ones, within the same memory.
"""

import torch


class Host:
    """Host memory for tensors of one device, and the stream that carries them.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory; on a GPU it is complete after `wait`."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self.stream is not None)
        if self.stream is None:
            return copy.copy_(tensor)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # its memory must not be handed out again before the copy has been made
        return copy

    def send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy host memory into a tensor on the device; `source` must not change before `wait`."""
        if self.stream is None:
            target.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Until all copies have been made."""
        if self.stream is not None:
            self.stream.synchronize()
