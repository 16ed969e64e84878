"""Mistakes that a type checker must find: one per line that ends in a comment. Checked by tests/test_types.py, never run."""

import torch

import fusedopt

params = torch.nn.Linear(3, 2).parameters()
fusedopt.AdamW(params, nonfinite="skp")  # mistake
fusedopt.AdamW(params, backend="cudnn")  # mistake
fusedopt.SGD(params, sparse="eager")  # mistake
fusedopt.Lion(params, betas="0.9")  # mistake
fusedopt.RMSprop(params, sparse="lazy")  # mistake
fusedopt.Adam(params, max_grad_norm="1.0")  # mistake
fusedopt.Adan(params, nonfinite=None)  # mistake
fusedopt.LAMB(params, backend=1)  # mistake
fusedopt.Adagrad(params, max_norm=1.0)  # mistake
fusedopt.Adam(3.0)  # mistake
fusedopt.Adam(params).nonfinite = "ignore"  # mistake
fusedopt.clip_grad_norm_([torch.optim.SGD(params)], 1.0)  # mistake
fusedopt.Adam(params).step(1.0)  # mistake
