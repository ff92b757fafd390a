"""Four-bit weights: NF4 as bitsandbytes writes it, the textbook affine scheme, and linear layers and models in NF4."""

from ..kernels.nf4 import NF4_CODE
from .affine import AffineTensor, dequantize_affine, quantize_affine
from .codebooks import dynamic_map, normal_quantile_levels
from .experts import NF4Experts
from .linear import NF4Linear
from .model import load_quantized, quantize_model
from .nf4 import NF4Tensor, dequantize_nf4, quantize_nf4
from .summary import QuantizationSummary, quantization_summary

__all__ = [
    "NF4_CODE", "AffineTensor", "NF4Experts", "NF4Linear", "NF4Tensor", "QuantizationSummary", "dequantize_affine",
    "dequantize_nf4", "dynamic_map", "load_quantized", "normal_quantile_levels", "quantization_summary",
    "quantize_affine", "quantize_model", "quantize_nf4",
]  # fmt: skip
