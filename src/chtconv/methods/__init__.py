"""The methods of sparse training: which links go, which come, how many, and when."""

from chtconv.methods.composition import METHODS, Method, method

__all__ = ["METHODS", "Method", "method"]
