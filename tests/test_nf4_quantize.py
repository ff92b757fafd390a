"""NF4 quantization: nearest levels, codes of scales, values that are not finite, and the error that remains."""

import pytest
import torch
from handtuned.kernels.nf4_quantize import CELL_SLOPE, CELL_START, THRESHOLDS, _cells, nf4_quantize_tiled
from handtuned.quant import dynamic_map, quantize_affine, quantize_nf4


def test_scale_codes_are_the_nearest_of_the_map():
    x = torch.randn(300, 1000)
    q, scales = quantize_nf4(x), quantize_nf4(x, double_quant=False).absmax
    d = scales - scales.mean()
    assert torch.equal(q.nested.offset, scales.mean())
    for i, block in enumerate(d.split(256)):
        assert q.nested.absmax[i] == block.abs().max()
        distance = (block.double()[:, None] / block.abs().max().double() - dynamic_map().double()).abs()
        chosen = distance.gather(1, q.absmax[i * 256 :][:256, None].long())[:, 0]
        assert torch.all(chosen <= distance.amin(1) + 1e-7)


def test_double_quantization_of_huge_scales_stays_finite():
    x = torch.full((64 * 600,), 3e38)
    x[::64] = -3e38
    assert quantize_nf4(x).dequantize().isfinite().all()


def test_the_bucket_trick_equals_the_search():
    """Every fp16 in [-1, 1], and the fp32 neighbours of each threshold and cell edge."""
    halves = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).float()
    edges = (torch.arange(33) - CELL_START) / CELL_SLOPE
    around = torch.cat([THRESHOLDS, edges]).view(torch.int32)[:, None] + torch.arange(-2000, 2001, dtype=torch.int32)
    x = torch.cat([halves, around.view(torch.float32).flatten(), torch.rand(1_000_000) * 2 - 1])
    x = x[x.abs() <= 1]
    x = torch.cat([torch.ones(len(x), 1), x[:, None]], dim=1).repeat_interleave(16, 1).flatten()  # absmax 1 everywhere
    packed, absmax = nf4_quantize_tiled(x, 32)
    assert torch.all(absmax == 1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    assert torch.equal(codes.int(), torch.bucketize(x, THRESHOLDS, out_int32=True))


def test_a_cell_holds_one_threshold_at_most_and_none_near_its_edge():
    cells = THRESHOLDS.double() * CELL_SLOPE + CELL_START
    assert len(set(cells.floor().tolist())) == 15
    # Rounding moves a value by some 2^-24 relative to 32 cells; the kernel rounds to whole eighths of a cell.
    assert (cells - cells.round()).abs().min() > 1e-4
    assert (_cells(torch.device("cpu"))[0] < 2).sum() == 15


@pytest.mark.parametrize("bad, count", [(float("nan"), "2 NaN and 0"), (float("inf"), "0 NaN and 2")])
@pytest.mark.parametrize("n", [64, 100, 5000])
def test_values_that_are_not_finite_are_refused(bad, count, n, each_backend, device):
    x = torch.randn(n, device=device)
    x[3], x[-1] = bad, -bad
    with pytest.raises(ValueError, match=rf"layer\.7 must be finite, got {count} infinite among {n} values"):
        quantize_nf4(x, name="layer.7")


def _relative_error(x, back):
    return ((x - back).double().norm() / x.double().norm()).item()


def test_errors_on_gaussian_and_uniform_weights():
    """Relative errors in groups of 64; 4 million values fix them to some 0.0002."""
    for x, nf4, absmax_int4, affine in (
        (torch.randn(4_000_000), 0.092, 0.108, 0.090),
        (torch.rand(4_000_000) * 2 - 1, 0.091, 0.070, 0.064),
    ):
        groups = x.view(-1, 64)
        step = groups.abs().amax(1, keepdim=True) / 7
        found = (
            _relative_error(x, quantize_nf4(x, double_quant=False).dequantize()),
            _relative_error(groups, (groups / step).round() * step),
            _relative_error(x, quantize_affine(x).dequantize()),
        )
        assert found == pytest.approx((nf4, absmax_int4, affine), abs=6e-4)
        assert _relative_error(x, quantize_nf4(x).dequantize()) == pytest.approx(found[0], abs=1e-4)
