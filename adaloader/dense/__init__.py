"""Dense parameters: their gradients are averaged over ranks, in buckets, while backward still runs.

The idea is PyTorch DDP's; `torch.distributed` moves the bytes. Imports `ranks`. Read `parameters.py` first, then
`buckets.py`.
"""
