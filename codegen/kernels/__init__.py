"""One file per kernel: `@triton.jit` functions, the launcher, and its `Kernel`."""
