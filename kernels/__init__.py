"""Triton kernels, installed as ``fusedopt.kernels``: rules.py the formulas, engine.py what runs any of them."""
