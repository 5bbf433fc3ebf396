"""The blocks that models are made of. Importing the package registers the fast forms of whole layers."""

from taco.layers import native_decoder

__all__ = ["native_decoder"]
