"""What the `kernels` library loads: it runs this file on its own, so the import is absolute."""

from helpers.reference_kernel.attention import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
