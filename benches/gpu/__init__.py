"""``make gpu-check``: verifies the CUDA backend on a device and measures it, with nothing but torch and CuPy."""
