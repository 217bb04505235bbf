"""Starts the kernels: a function for each pass, which makes its buffers, picks its tiles and passes its arguments.

Nothing here waits for the device, and no size depends on data, so a call can be captured into a CUDA graph.
"""

from attnstats.triton.launch.arguments import RowLse, block_dim, kernel_weight, on_device
from attnstats.triton.launch.backward_pass import MapGradients, backward, backward_kernels
from attnstats.triton.launch.band_pass import band, band_tile, slot_count
from attnstats.triton.launch.column_pass import columns, pooled
from attnstats.triton.launch.forward_pass import MAX_MARKS, forward, forward_tile, marks_of, rows, segments, splits
from attnstats.triton.launch.start import Launch, launching_with
from attnstats.triton.launch.top_pass import top

__all__ = [
    "MAX_MARKS",
    "Launch",
    "MapGradients",
    "RowLse",
    "backward",
    "backward_kernels",
    "band",
    "band_tile",
    "block_dim",
    "columns",
    "forward",
    "forward_tile",
    "kernel_weight",
    "launching_with",
    "marks_of",
    "on_device",
    "pooled",
    "rows",
    "segments",
    "slot_count",
    "splits",
    "top",
]
