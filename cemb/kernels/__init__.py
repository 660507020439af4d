"""Compiled kernels: Numba's for CPUs, Triton's for GPUs."""
