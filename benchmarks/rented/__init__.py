"""What runs on a rented GPU: the record of what is done, packing, and the parts of gpu.py."""
