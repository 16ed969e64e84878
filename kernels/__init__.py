"""Triton kernels, installed as ``fusedopt.kernels``: rules.py has the formulas, storage.py the formats, engine.py runs them."""
