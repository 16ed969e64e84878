"""Keeps torch.compile out of the functions that it cannot trace."""

import torch

try:
    # What torch.optim uses. torch.compiler.disable would import torch._dynamo now, which takes about a second.
    from torch._compile import _disable_dynamo as not_compiled
except ImportError:
    not_compiled = torch.compiler.disable

__all__ = ["not_compiled"]
