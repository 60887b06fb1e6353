"""CUDA tensors through CuPy: raw kernels for what no library fuses, cuBLAS for the large products.

Everything runs on torch's current stream, in torch's memory, without waiting for the device; see ``docs/gpu.md``.
"""

from .apart import Cupy
from .device import Device, device_for, register, unavailable
from .elementwise import elementwise_step
from .fused import lowrank_step
from .pending import Pending

__all__ = ["Cupy", "Device", "Pending", "device_for", "elementwise_step", "lowrank_step", "register", "unavailable"]
