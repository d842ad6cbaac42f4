"""The reference kernel: FlashAttention-2's contract, computed by PyTorch on any device.

`attention.py` holds the functions. This folder is also a kernel repository in the layout of the
`kernels` library: with `LOCAL_KERNELS="kernels-community/flash-attn2=<this folder>"` that library
loads `torch-universal/`, whichever backend it detects.
"""
