"""Triton kernels, for NVIDIA and AMD GPUs. `fastvq.backends.triton` declares which ops they serve.

With TRITON_INTERPRET=1 in the environment from the start they run on the CPU in Triton's interpreter, slowly.
"""
