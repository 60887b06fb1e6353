"""CUDA tensors through CuPy: raw kernels for what no library fuses, cuBLAS for the large products.

Everything runs on torch's current stream, in torch's memory, without waiting for the device; see ``docs/gpu.md``.
"""

from .backend import CupyBackend
from .device import Device, device_for, register, unavailable

__all__ = ["CupyBackend", "Device", "device_for", "register", "unavailable"]
