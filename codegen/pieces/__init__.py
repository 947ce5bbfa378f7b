"""What several kernels share: `@triton.jit` functions and plain functions of their launchers."""
