"""GPUs: what cards can do, what a kernel's machine code lets one expect of them."""
