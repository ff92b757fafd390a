"""4-bit formats: NF4 as bitsandbytes writes it, the documents' affine scheme, layers and models on top."""

from ..kernels.nf4 import NF4_CODE
from .linear import NF4Linear
from .model import quantize_model
from .nf4 import NF4Tensor, dequantize_nf4, quantize_nf4

__all__ = ["NF4_CODE", "NF4Linear", "NF4Tensor", "dequantize_nf4", "quantize_model", "quantize_nf4"]
