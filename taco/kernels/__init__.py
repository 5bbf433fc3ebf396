"""Operations of the device side: one typed function each, a plain-torch reference, faster candidates.

Importing the package registers all candidates.
"""

from taco.kernels import attention, cpu_attention

__all__ = ["attention", "cpu_attention"]
