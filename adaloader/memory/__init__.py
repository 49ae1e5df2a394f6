"""Memory: the host's, a device's, and buffers that are used again. Read `device_memory.py` first."""
