"""Memory: the host's, a device's, and which rows are kept on the device. Read `device_memory.py` first."""
