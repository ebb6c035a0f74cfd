"""Batch k from integers: in C++ (``csrc/index_engine``) and in NumPy, bit for bit the same."""
