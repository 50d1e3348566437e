"""The softmax pass over a chunk of logits in one Triton kernel; the matrix products are PyTorch's."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from zoo.kernels.cross_entropy import chunks, triton_kernels
from zoo.kernels.cross_entropy.chunks import Settings
from zoo.kernels.launch import Launches

_LAUNCHES = Launches("cross_entropy")

linear_cross_entropy = partial(chunks.linear_cross_entropy, __name__)


def softmax_pass(
    logits: Tensor, targets: Tensor, scales: Tensor | None, losses: Tensor, settings: Settings, gradients: bool
) -> None:
    ignore_index, softcap, z_loss, smoothing = settings
    rows, vocab = logits.shape
    _LAUNCHES.run(
        triton_kernels.cross_entropy_chunk,
        (rows,),
        logits.device,
        {"vocab": vocab},
        *(logits, targets, scales, losses, vocab, ignore_index, softcap or 1.0, z_loss, smoothing),
        HAS_SCALES=scales is not None,
        HAS_SOFTCAP=softcap is not None,
        SMOOTHED=smoothing > 0,
        GRADIENTS=gradients,
    )
