"""Triton kernels, installed as ``fusedopt.kernels``. This version has none yet: ``backend="triton"`` says so."""
