"""Triton where it is installed; elsewhere names under which kernels can be defined, but not launched."""

from typing import Any

try:
    import triton
    import triton.language as tl

    INSTALLED = True
except ImportError:  # a machine without an accelerator: the CPU path needs none of it

    class _Missing:
        constexpr = staticmethod(lambda value=None: value)

        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return function if function else lambda function: function

    triton = tl = _Missing()
    INSTALLED = False

__all__ = ["INSTALLED", "tl", "triton"]
